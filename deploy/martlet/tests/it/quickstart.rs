//! What a new user does: start, paste the printed lines, kill, start again; and what the executable says when something is off.

use std::{
    io::BufRead as _,
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{
    app_server::Http,
    broker::{Broker, MARTLET, martlet, text},
};

/// The printed line that begins so. The broker is ready a moment before its last line is out, so this waits for that one.
fn printed(broker: &Broker, begin: &str) -> String {
    let until = Instant::now() + PRINTED;
    loop {
        let log = broker.log_text();
        if log.contains("End with Ctrl-C.\n") {
            let line = log.lines().rev().map(str::trim).find(|line| line.starts_with(begin));
            return line.unwrap_or_else(|| panic!("no line begins with {begin}:\n{log}")).to_owned();
        }
        assert!(Instant::now() < until, "the last line was not printed within {PRINTED:?}:\n{log}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// How long a broker that is ready may take to print its lines, on a machine that does other work too.
const PRINTED: Duration = Duration::from_secs(30);

/// What the printed line needs of curl, for machines that have none.
const CURL: &str = r#"#!/usr/bin/env python3
import sys, urllib.request
arguments, headers, body = sys.argv[1:], {}, None
while len(arguments) > 1:
    flag, value = arguments.pop(0), arguments.pop(0)
    if flag == "-H":
        name, _, text = value.partition(": ")
        headers[name] = text
    elif flag == "-d":
        body = value.encode()
    else:
        sys.exit("flag " + flag + " is not known here")
request = urllib.request.Request(arguments[0], body, headers)
sys.stdout.write(urllib.request.urlopen(request).read().decode())
"#;

/// A folder with a stand-in for curl, empty where there is one.
fn curl() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    if Command::new("curl").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("curl is missing: a stand-in in Python sends what the printed line says");
        let file = dir.path().join("curl");
        std::fs::write(&file, CURL).unwrap();
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    dir
}

/// Runs a line as pasted into a shell; what it printed.
fn paste(line: &str) -> String {
    let curl = curl();
    let path = format!("{}:{}", text(curl.path()), std::env::var("PATH").unwrap());
    let output = Command::new("sh").args(["-c", line]).env("PATH", path).stdin(Stdio::null()).output().unwrap();
    let out = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{line}\n{out}{}", String::from_utf8_lossy(&output.stderr));
    out
}

#[test]
fn the_printed_lines_work_as_pasted_also_when_the_device_comes_later_and_after_a_kill() {
    let mut broker = Broker::start();
    let device = |broker: &Broker| format!("{} --count 1 --json", printed(broker, MARTLET));
    // The device is there first.
    let line = device(&broker);
    let waiting = thread::spawn(move || paste(&line));
    let answer = paste(&printed(&broker, "curl"));
    assert!(answer.contains(r#""success":1"#), "{answer}");
    assert!(waiting.join().unwrap().contains(r#""hello":"world""#));
    // The device comes after the send.
    paste(&printed(&broker, "curl"));
    let arrived = paste(&device(&broker));
    assert_eq!(arrived.matches("hello").count(), 1, "{arrived}");
    // The broker is killed in between.
    paste(&printed(&broker, "curl"));
    broker.kill();
    broker.restart();
    let arrived = paste(&device(&broker));
    assert_eq!(arrived.matches("hello").count(), 1, "{arrived}");
}

#[test]
fn sigterm_drains_and_a_second_start_keeps_ca_keys_and_projects() {
    let mut broker = Broker::start();
    let file = broker.data().join("connection.json");
    let (before, ca) = (broker.connection.clone(), std::fs::read(broker.ca_file()).unwrap());
    let device = std::fs::read(broker.data().join("device.json")).unwrap();
    assert!(broker.terminate().success(), "{}", broker.log_text());
    assert!(!file.exists(), "no broker is ready there any more");
    broker.restart();
    assert_eq!(broker.connection, before);
    assert_eq!(std::fs::read(broker.ca_file()).unwrap(), ca);
    assert_eq!(std::fs::read(broker.data().join("device.json")).unwrap(), device);
}

#[test]
fn connection_json_names_every_listener_that_is_there_and_no_other() {
    let broker = crate::broker::shared();
    let keys: Vec<_> = broker.connection.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["http", "https", "mcs", "grpc", "admin", "ca_file", "projects"]);
    let address = |what: &str| broker.connection[what].as_str().unwrap();
    assert!(address("http").starts_with("http://127.0.0.1:") && address("https").starts_with("https://127.0.0.1:"));
}

#[test]
fn a_second_broker_on_the_same_directory_is_refused_by_name() {
    let broker = crate::broker::shared();
    let data = broker.data();
    let (status, _, said) =
        martlet(&["standalone", "--data", text(&data), "--grpc", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
    assert!(!status.success());
    assert!(said.contains(text(&data)) && said.contains("lock"), "{said}");
    assert!(data.join("connection.json").exists(), "the running broker is not disturbed");
}

#[test]
fn a_taken_port_is_named_with_its_flag() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for flag in ["--http", "--https", "--mcs", "--admin", "--grpc"] {
        let dir = tempfile::tempdir().unwrap();
        let mut arguments = vec!["standalone", "--data", text(dir.path())];
        for other in ["--http", "--https", "--mcs", "--admin", "--grpc"] {
            arguments.extend([other, if other == flag { &address } else { "127.0.0.1:0" }]);
        }
        let (status, _, said) = martlet(&arguments);
        assert!(!status.success());
        assert!(said.contains(flag) && said.contains(&address), "{flag}: {said}");
    }
}

#[test]
fn health_and_metrics_answer_where_connection_json_says() {
    let broker = crate::broker::shared();
    let get = |path: &str| Http::connect(&broker.address("admin")).request("GET", path, &[], b"");
    for path in ["/startupz", "/readyz", "/livez"] {
        assert_eq!(get(path).status, 200, "{path}");
    }
    let metrics = get("/metrics");
    assert!(metrics.header("content-type").unwrap().starts_with("application/openmetrics-text"));
    let text = metrics.text();
    assert!(text.contains("martlet_node_") && text.contains("martlet_gateway_") && text.ends_with("# EOF\n"), "{text}");
    // No token, key or payload is in them.
    assert!(!text.contains("APA91b") && !text.contains(crate::broker::ONE.1));
}

#[test]
fn logs_and_files_hold_no_server_key_in_clear_but_the_user_s_own() {
    let broker = crate::broker::shared();
    let key = crate::broker::ONE.1.as_bytes();
    let secret = std::fs::read_to_string(broker.data().join("secret")).unwrap();
    let node = broker.data().join("node");
    let mut files = vec![node];
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let content = std::fs::read(&path).unwrap();
        for word in [key, secret.trim().as_bytes()] {
            assert!(!content.windows(word.len()).any(|window| window == word), "{}", path.display());
        }
    }
}

#[test]
fn a_node_refuses_a_public_address_without_tls_unless_told() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("node.toml");
    std::fs::write(&config, "[node]\nlisten = \"0.0.0.0:0\"\n").unwrap();
    let data = dir.path().join("data");
    let node = ["node", "--config", text(&config)];
    let standalone = [&["standalone", "--data", text(&data), "--grpc", "0.0.0.0:0"][..], &FREE_PORTS[..8]].concat();
    for refused in [&node[..], &standalone] {
        let (status, _, said) = martlet(refused);
        assert!(!status.success());
        assert!(said.contains("node.listen") && said.contains("--insecure-grpc"), "{said}");
    }
    assert!(!data.join("node/log").exists(), "nothing was begun");

    let mut permitted = Running::start(&[&standalone[..], &["--insecure-grpc"]].concat());
    let file = data.join("connection.json");
    permitted.until("it serves", || file.exists());
    let connection: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert!(connection["grpc"].as_str().unwrap().starts_with("0.0.0.0:"), "{connection}");
    let secret = dir.path().join("secret");
    std::fs::write(&secret, "ab".repeat(32)).unwrap();
    let own = dir.path().join("own");
    let whole = format!(
        "[node]\nlisten = \"0.0.0.0:0\"\ndata = {own:?}\nsecret_file = {secret:?}\n[admin]\nlisten = \"127.0.0.1:0\"\n"
    );
    std::fs::write(&config, whole).unwrap();
    let mut permitted = Running::start(&[&node[..], &["--insecure-grpc"]].concat());
    permitted.until("the node has begun its log", || own.join("log").exists());
}

/// Every listener of `standalone` on a port that is free; gRPC last.
const FREE_PORTS: [&str; 10] = [
    "--http",
    "127.0.0.1:0",
    "--https",
    "127.0.0.1:0",
    "--mcs",
    "127.0.0.1:0",
    "--admin",
    "127.0.0.1:0",
    "--grpc",
    "127.0.0.1:0",
];

/// The executable, killed when dropped.
struct Running(Child);

impl Running {
    fn start(arguments: &[&str]) -> Self {
        Self::by(Command::new(MARTLET).args(arguments))
    }

    fn by(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    fn until(&mut self, what: &str, mut holds: impl FnMut() -> bool) {
        let end = Instant::now() + PRINTED;
        while !holds() {
            assert!(Instant::now() < end, "never: {what}");
            assert_eq!(self.0.try_wait().unwrap(), None, "it has ended before {what}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A node and a gateway that serve nobody, by their configuration.
fn idle_roles(dir: &Path) -> [Vec<String>; 2] {
    let secret = dir.join("secret");
    std::fs::write(&secret, "ab".repeat(32)).unwrap();
    let admin = "[admin]\nlisten = \"127.0.0.1:0\"\n[telemetry]\nlog = \"debug\"\n";
    let node =
        format!("[node]\nlisten = \"127.0.0.1:0\"\ndata = {:?}\nsecret_file = {secret:?}\n{admin}", dir.join("own"));
    let gateway =
        format!("[gateway]\nseeds = [\"127.0.0.1:1\"]\nhttp = \"127.0.0.1:0\"\nsecret_file = {secret:?}\n{admin}");
    [("node", node), ("gateway", gateway)].map(|(role, config)| {
        let file = dir.join(role).with_extension("toml");
        std::fs::write(&file, config).unwrap();
        vec![role.to_owned(), "--config".to_owned(), text(&file).to_owned()]
    })
}

#[test]
fn the_limit_of_descriptors_is_raised_at_the_start_of_every_role() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let standalone = [&["standalone", "--data", text(&data)][..], &FREE_PORTS].concat();
    let mut roles = idle_roles(dir.path()).to_vec();
    roles.push(standalone.into_iter().map(str::to_owned).collect());
    for role in roles {
        let script = r#"ulimit -S -n 128 && exec "$@""#;
        let mut process = Running::by(Command::new("sh").args(["-c", script, "sh", MARTLET]).args(&role));
        let limits = format!("/proc/{}/limits", process.0.id());
        let open_files = || {
            let text = std::fs::read_to_string(&limits).unwrap();
            let line = text.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
            let [soft, hard] = [0, 1].map(|nth| line.split_whitespace().nth(nth).unwrap().to_owned());
            (soft, hard)
        };
        process.until(&format!("{} raised its limit", role[0]), || {
            let (soft, hard) = open_files();
            assert_ne!(hard, "128", "this machine permits too few descriptors to show it");
            soft == hard
        });
    }
}

#[test]
fn logs_are_json_lines_unless_a_terminal_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let first_line = |output: &mut dyn std::io::Read| {
        let lines = std::io::BufReader::new(output).lines().map(Result::unwrap);
        lines.map(|line| line.trim().to_owned()).find(|line| !line.is_empty()).unwrap()
    };
    for role in idle_roles(dir.path()) {
        let mut piped = Running::start(&role.iter().map(String::as_str).collect::<Vec<_>>());
        let line = first_line(piped.0.stderr.as_mut().unwrap());
        let json: serde_json::Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        for key in ["timestamp", "level", "target", "message"] {
            assert!(json[key].is_string(), "{key}: {line}");
        }
        drop(piped);
        // A terminal of its own; the role ends with it.
        // Also where whoever runs the tests ignores hangups.
        let terminal = "import pty, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); pty.spawn(sys.argv[1:])";
        let mut shown = Running::by(Command::new("python3").args(["-c", terminal, MARTLET]).args(&role));
        let line = first_line(shown.0.stdout.as_mut().unwrap());
        assert!(serde_json::from_str::<serde_json::Value>(&line).is_err(), "{line}");
        assert!(["INFO", "DEBUG", "WARN"].iter().any(|level| line.contains(level)), "{line}");
    }
}

#[test]
fn help_names_every_role_and_an_unknown_key_ends_the_process_with_its_name() {
    let (status, help, _) = martlet(&["--help"]);
    assert!(status.success());
    for role in ["standalone", "node", "gateway", "device", "ca", "admin"] {
        assert!(help.contains(role), "{help}");
    }
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("gateway.toml");
    std::fs::write(&config, "[gateway]\nseed = \"a:1\"\n").unwrap();
    let (status, _, said) = martlet(&["gateway", "--config", text(&config)]);
    assert!(!status.success() && said.contains("seed"), "{said}");
}
