//! The configuration of the process: one TOML file, then `MARTLET_…` variables, then flags.
//!
//! Owns how the three come together and the sections of the process itself (`[admin]`, `[telemetry]`); the sections of node and
//! gateway belong to those crates, which also check them. The invariant: a key that nobody knows is an error, wherever it was
//! given, so that a typing mistake never becomes a default.

use std::{fs, net::SocketAddr, path::Path};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use toml::{Table, Value};

use crate::telemetry::TelemetryConfig;

/// Variables that begin so are configuration: `MARTLET_NODE__ID=2` is `id` of `[node]`.
const VARIABLE_PREFIX: &str = "MARTLET_";

/// Between section and key in the name of a variable.
const VARIABLE_SEPARATOR: &str = "__";

/// Section `[admin]`: metrics, health and readiness.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct AdminConfig {
    /// Address of `/metrics`, `/startupz`, `/readyz` and `/livez`.
    pub(crate) listen: SocketAddr,
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 9400)) }
    }
}

/// What the process itself is told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ProcessConfig {
    /// Metrics, health and readiness.
    pub(crate) admin: AdminConfig,
    /// Logs and traces.
    pub(crate) telemetry: TelemetryConfig,
}

/// Everything one process is told.
#[derive(Debug, Clone, Default)]
pub(crate) struct Config {
    /// The process.
    pub(crate) process: ProcessConfig,
    /// Sections of the node.
    pub(crate) node: martlet_node::Config,
    /// Sections of the gateway.
    pub(crate) gateway: martlet_gateway::Config,
}

impl Config {
    /// Reads `file` if one is given, then the variables.
    ///
    /// # Errors
    /// Names the file or variable and the key.
    pub(crate) fn read(file: Option<&Path>, variables: impl Iterator<Item = (String, String)>) -> Result<Self> {
        let mut table = match file {
            Some(path) => {
                let text = fs::read_to_string(path).with_context(|| format!("read --config {}", path.display()))?;
                text.parse::<Table>().with_context(|| format!("parse --config {}", path.display()))?
            }
            None => Table::new(),
        };
        for (name, value) in variables {
            lay_over(&mut table, &name, &value)?;
        }
        Self::from_table(table)
    }

    /// Takes the sections apart.
    ///
    /// # Errors
    /// An unknown section or key, or a value of another type.
    pub(crate) fn from_table(table: Table) -> Result<Self> {
        let (mut process, mut node, mut gateway) = (Table::new(), Table::new(), Table::new());
        let owners = [sections_of(&ProcessConfig::default()), sections_of(&martlet_node::Config::default())];
        let of_gateway = sections_of(&martlet_gateway::Config::default());
        for (section, value) in table {
            if owners[0].contains(&section) {
                process.insert(section, value);
            } else if owners[1].contains(&section) {
                node.insert(section, value);
            } else if of_gateway.contains(&section) {
                gateway.insert(section, value);
            } else {
                let known = owners.concat().into_iter().chain(of_gateway).collect::<Vec<_>>().join("], [");
                bail!("configuration: there is no section [{section}]; there are [{known}]");
            }
        }
        Ok(Self { process: part(process)?, node: part(node)?, gateway: part(gateway)? })
    }
}

/// Names of the sections of one owner.
fn sections_of<T: Serialize>(defaults: &T) -> Vec<String> {
    let table = Table::try_from(defaults).expect("configuration is made of tables");
    table.keys().cloned().collect()
}

fn part<T: DeserializeOwned>(table: Table) -> Result<T> {
    // Through text: only then does the error show the line with the key.
    toml::from_str(&table.to_string()).context("configuration")
}

/// Puts the value of one variable into the table. Other variables of the environment are left alone.
fn lay_over(table: &mut Table, name: &str, value: &str) -> Result<()> {
    let Some((section, key)) = name.strip_prefix(VARIABLE_PREFIX).and_then(|rest| rest.split_once(VARIABLE_SEPARATOR))
    else {
        return Ok(());
    };
    let (section, key) = (section.to_lowercase(), key.to_lowercase());
    // `7`, `true` and `["a"]` are what they are in TOML; anything else is a string.
    let line = format!("value = {value}");
    let value = line.parse::<Table>().ok().and_then(|mut parsed| parsed.remove("value"));
    let value = value.unwrap_or_else(|| Value::String(line["value = ".len()..].to_owned()));
    let entry = table.entry(section.clone()).or_insert_with(|| Value::Table(Table::new()));
    let Value::Table(entry) = entry else { bail!("{name}: [{section}] is not a section") };
    entry.insert(key, value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, variables: &[(&str, &str)]) -> Result<Config> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("martlet.toml");
        fs::write(&file, text).unwrap();
        Config::read(Some(&file), variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())))
    }

    #[test]
    fn a_variable_wins_over_the_file() {
        let config = read("[node]\nid = 2\n", &[("MARTLET_NODE__ID", "3"), ("PATH", "/bin")]).unwrap();
        assert_eq!(config.node.node.id, 3);
    }

    #[test]
    fn a_variable_may_be_a_number_a_list_or_a_string() {
        let variables = [
            ("MARTLET_GATEWAY__SEEDS", r#"["a:1", "b:2"]"#),
            ("MARTLET_NODE__ADVERTISE", "node-0.martlet:7400"),
            ("MARTLET_NODE__DRAIN_MAX", "7s"),
        ];
        let config = read("", &variables).unwrap();
        assert_eq!(config.gateway.gateway.seeds, ["a:1", "b:2"]);
        assert_eq!(config.node.node.advertise, "node-0.martlet:7400");
        assert_eq!(config.node.node.drain_max.as_secs(), 7);
    }

    #[test]
    fn unknown_sections_and_keys_are_errors_that_name_them() {
        let text = |result: Result<Config>| format!("{:#}", result.unwrap_err());
        assert!(text(read("[nodes]\nid = 2\n", &[])).contains("[nodes]"));
        assert!(text(read("[node]\nidd = 2\n", &[])).contains("idd"));
        assert!(text(read("", &[("MARTLET_NODE__IDD", "2")])).contains("idd"));
        assert!(text(read("[node]\nid = \"two\"\n", &[])).contains("id"));
    }

    /// Fields of a struct that refuses unknown keys: its error lists them.
    fn fields_of<T: DeserializeOwned>(section: &str) -> Vec<String> {
        let error = toml::from_str::<T>(&format!("[{section}]\n\"no such key\" = 1\n")).err().unwrap().to_string();
        let listed = error.split_once("expected").map(|(_, list)| list.to_owned()).unwrap_or_default();
        listed.split('`').skip(1).step_by(2).map(ToOwned::to_owned).collect()
    }

    /// Every key of every section: fields, and the default's value where it has one.
    fn keys() -> Vec<(String, String, Option<Value>)> {
        fn of<T: Serialize + DeserializeOwned + Default>(all: &mut Vec<(String, String, Option<Value>)>) {
            let defaults = Table::try_from(T::default()).unwrap();
            for (section, values) in defaults {
                for field in fields_of::<T>(&section) {
                    let value = values.get(&field).cloned();
                    all.push((section.clone(), field, value));
                }
            }
        }
        let mut all = Vec::new();
        of::<ProcessConfig>(&mut all);
        of::<martlet_node::Config>(&mut all);
        of::<martlet_gateway::Config>(&mut all);
        all
    }

    const REFERENCE: &str = include_str!("../../config/default.toml");

    #[test]
    fn the_reference_has_every_key_with_its_default_and_an_explanation() {
        let table = REFERENCE.parse::<Table>().unwrap();
        let lines: Vec<&str> = REFERENCE.lines().collect();
        let mut wrong = Vec::new();
        for (section, key, default) in keys() {
            match &default {
                Some(value) => {
                    let written = table.get(&section).and_then(|values| values.get(&key));
                    if written != Some(value) {
                        wrong.push(format!("[{section}] {key} = {value} is written as {written:?}"));
                    }
                }
                // No default: it stands as a comment, with an example.
                None if lines.iter().any(|line| line.starts_with(&format!("# {key} = "))) => {}
                None => wrong.push(format!("[{section}] # {key} = … is missing")),
            }
        }
        assert!(wrong.is_empty(), "deploy/config/default.toml:\n{}", wrong.join("\n"));
        for (at, line) in lines.iter().enumerate().skip(1) {
            let is_key = line.split_once(" = ").is_some_and(|(key, _)| !key.contains([' ', '#']));
            let explained = lines[at - 1].starts_with("# ") && lines[at - 1].len() > "# ?".len();
            assert!(!is_key || explained, "line {}: {line} has no explanation", at + 1);
        }
    }

    #[test]
    fn the_reference_names_no_key_that_does_not_exist() {
        Config::from_table(REFERENCE.parse().unwrap()).unwrap();
    }
}
