//! The documents name only what exists: files and folders, subcommands and their flags. Those of `martlet-loadtest` are looked at in
//! its own package.

use std::{collections::BTreeSet, fs, path::Path};

use crate::broker::martlet;

/// Top of the repository.
fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

const DOCUMENTS: [&str; 5] = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "deploy/README.md", "loadtest/README.md"];

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn every_path_that_a_document_names_exists() {
    const TOPS: [&str; 6] = ["proto/", "node/", "gateway/", "deploy/", "loadtest/", ".ci/"];
    let mut seen = 0;
    for document in DOCUMENTS {
        let text = fs::read_to_string(root().join(document)).unwrap();
        for path in quoted(&text).filter(|word| TOPS.iter().any(|top| word.starts_with(top))) {
            seen += 1;
            assert!(root().join(path).exists(), "{document} names {path}");
        }
    }
    assert!(seen > 10, "{seen} paths were found");
}

#[test]
fn every_flag_that_a_document_gives_a_role_is_one() {
    let mut seen = 0;
    for document in DOCUMENTS {
        let text = fs::read_to_string(root().join(document)).unwrap();
        for line in text.split(['`', '\n']) {
            let line = line.trim().split(" #").next().unwrap_or_default();
            let line = line.strip_prefix("cargo run --release -- ").or_else(|| line.strip_prefix("martlet "));
            let words: Vec<_> = line.into_iter().flat_map(str::split_whitespace).collect();
            let role = words.iter().take_while(|word| word.bytes().all(|byte| byte.is_ascii_lowercase())).take(3);
            let role: Vec<&str> = role.copied().collect();
            let flags: Vec<_> = words.iter().filter(|word| word.starts_with("--")).collect();
            if role.is_empty() || flags.is_empty() {
                continue;
            }
            let (status, help, said) = martlet(&[&role[..], &["--help"]].concat());
            assert!(status.success(), "{document}: {role:?}: {said}");
            for flag in flags {
                seen += 1;
                assert!(
                    help.contains(&format!("{flag} ")) || help.contains(&format!("{flag}\n")),
                    "{document}: {role:?} {flag}"
                );
            }
        }
    }
    assert!(seen >= 5, "{seen} flags were found");
}

#[test]
fn every_admin_command_that_a_document_names_is_one() {
    let mut commands = BTreeSet::new();
    for document in DOCUMENTS {
        let text = fs::read_to_string(root().join(document)).unwrap();
        for line in text.split(['`', '\n']) {
            let mut words = line.trim().strip_prefix("martlet admin ").into_iter().flat_map(str::split_whitespace);
            if let (Some(what), Some(how)) = (words.next(), words.next()) {
                commands.insert((what.to_owned(), how.to_owned()));
            }
        }
    }
    assert!(commands.len() >= 2, "{commands:?}");
    for (what, how) in commands {
        let (status, help, said) = martlet(&["admin", &what, &how, "--help"]);
        assert!(status.success(), "martlet admin {what} {how}: {said}");
        assert!(help.contains("Usage: martlet admin"), "{help}");
    }
}
