//! Published client libraries, unmodified and pinned, over TLS against the built executable: how they are installed and run, those
//! that receive, and one that comes back when it is told. `senders` has those that send.
//!
//! Each library has a folder in tests/clients: its lock file and a script that says what the library is told. They are installed
//! once, under target/clients, behind a lock, because test processes run side by side.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    app_server::{Http, send_json},
    broker::{Broker, MARTLET, ONE, shared},
    device::{PATIENCE, check_in, value},
};

/// Where the scripts and lock files are.
const SCRIPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients");

/// Where the libraries are installed: beside the executable's build, so that `cargo clean` removes them.
fn installed(library: &str) -> PathBuf {
    let target = Path::new(MARTLET).parent().unwrap().parent().unwrap();
    target.join("clients").join(library)
}

/// Copies a library's folder to where it is installed, and runs `install` there unless the very same was installed before.
fn install(library: &str, install: impl Fn(&Path)) -> PathBuf {
    let (source, dir) = (Path::new(SCRIPTS).join(library), installed(library));
    fs::create_dir_all(&dir).unwrap();
    let lock = fs::File::create(dir.with_extension("lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let mut pinned = Vec::new();
    for entry in fs::read_dir(&source).unwrap() {
        let path = entry.unwrap().path();
        let content = fs::read(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        fs::write(dir.join(&name), &content).unwrap();
        if name.ends_with("lock.json") || name.ends_with(".txt") {
            pinned.extend(content);
        }
    }
    let done = dir.join("installed");
    if fs::read(&done).ok().as_deref() != Some(&pinned[..]) {
        install(&dir);
        fs::write(&done, &pinned).unwrap();
    }
    dir
}

/// Runs a command that installs; says how to do it by hand where it fails.
fn must(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output();
    let output =
        output.unwrap_or_else(|error| panic!("{command:?}: {error}; install Node.js, npm and Python 3 (.ci/run does)"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}\n.ci/run installs what is missing");
}

pub(crate) fn npm(library: &str) -> PathBuf {
    install(library, |dir| {
        must(Command::new("npm").args(["ci", "--ignore-scripts", "--no-audit", "--no-fund"]).current_dir(dir))
    })
}

pub(crate) fn pip(library: &str) -> PathBuf {
    install(library, |dir| {
        must(Command::new("python3").args(["-m", "venv", "venv"]).current_dir(dir));
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", "requirements.txt"];
        must(Command::new("venv/bin/python").args(pip).current_dir(dir));
    })
}

pub(crate) fn node(broker: &Broker, dir: &Path, script: &str) -> Command {
    let port = |what: &str| broker.address(what).rsplit_once(':').unwrap().1.to_owned();
    let mut command = Command::new("node");
    command
        .arg("-r")
        .arg(Path::new(SCRIPTS).join("redirect.cjs"))
        .arg(dir.join(script))
        .env("NODE_EXTRA_CA_CERTS", broker.ca_file())
        .env("MARTLET_HTTPS", port("https"))
        .env("MARTLET_MCS", port("mcs"))
        // fcm-node would send through it.
        .env_remove("http_proxy")
        .env("NO_PROXY", "127.0.0.1")
        .stdin(Stdio::null());
    command
}

pub(crate) fn python(broker: &Broker, dir: &Path, script: &str) -> Command {
    let mut command = Command::new(dir.join("venv/bin/python"));
    command
        .arg(dir.join(script))
        // Of `requests`, and of Python itself.
        .env("REQUESTS_CA_BUNDLE", broker.ca_file())
        .env("SSL_CERT_FILE", broker.ca_file())
        .env("NO_PROXY", "127.0.0.1")
        .stdin(Stdio::null());
    command
}

/// Runs a script to its end; its last line, as JSON.
pub(crate) fn last_line(command: &mut Command) -> Value {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    serde_json::from_str(out.lines().last().unwrap_or_default()).unwrap_or_else(|error| panic!("{error}: {out}{err}"))
}

/// A script that goes on; it is killed when dropped.
pub(crate) struct Script {
    child: Child,
    lines: mpsc::Receiver<Value>,
}

impl Script {
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let stdout: ChildStdout = child.stdout.take().unwrap();
        let (sender, lines) = mpsc::sync_channel(1_000);
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // The library may print lines of its own.
                if let Ok(json) = serde_json::from_str(&line)
                    && sender.send(json).is_err()
                {
                    return;
                }
            }
        });
        Self { child, lines }
    }

    /// The next line that has `key`.
    pub(crate) fn next(&self, key: &str) -> Value {
        loop {
            let line = self.lines.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("no {key}: {error}"));
            if !line[key].is_null() {
                return line[key].clone();
            }
        }
    }

    /// Asserts that no line with `key` comes for a while.
    fn none(&self, key: &str) {
        while let Ok(line) = self.lines.recv_timeout(Duration::from_millis(600)) {
            assert!(line[key].is_null(), "{line}");
        }
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Requests to this endpoint that a broker has answered.
pub(crate) fn requests(broker: &Broker, endpoint: &str) -> f64 {
    broker.metric(&format!("martlet_gateway_http_requests_total{{endpoint=\"{endpoint}\""))
}

#[test]
fn h165_pyfcm_comes_back_when_it_is_told_and_never_after_a_success() {
    let mut broker = Broker::start();
    let dir = pip("python");
    let identity = check_in(&broker);
    let token = identity.register(&broker, "com.example.app", ONE.0);
    let (grpc, secret) = (broker.address("grpc"), broker.data().join("secret"));
    // A gateway that finds no node answers 503, and when to come back.
    broker.kill();
    let [http, admin] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string());
    let config = tempfile::NamedTempFile::new().unwrap();
    let text = format!(
        "[gateway]\nseeds = [\"{grpc}\"]\nsecret_file = {secret:?}\nhttp = \"{http}\"\n[http]\nretry_after_secs = 1\n\
         [admin]\nlisten = \"{admin}\"\n"
    );
    fs::write(config.path(), text).unwrap();
    let mut gateway = Command::new(MARTLET);
    let gateway = gateway.args(["gateway", "--config"]).arg(config.path()).stdin(Stdio::null());
    let _gateway = Script { child: gateway.spawn().unwrap(), lines: mpsc::sync_channel(0).1 };
    let until = Instant::now() + PATIENCE;
    while TcpStream::connect(&http).is_err() || TcpStream::connect(&admin).is_err() {
        assert!(Instant::now() < until, "the gateway does not listen");
        thread::sleep(Duration::from_millis(20));
    }
    let answered = |status: &str| {
        let metrics = Http::connect(&admin).request("GET", "/metrics", &[], b"");
        let begin = format!("martlet_gateway_http_requests_total{{endpoint=\"Send\",status=\"{status}\"}} ");
        metrics.text().lines().find_map(|line| line.strip_prefix(&begin)?.parse::<u32>().ok()).unwrap_or(0)
    };
    let mut command = Command::new(dir.join("venv/bin/python"));
    command.arg(dir.join("retry.py")).args([&format!("http://{http}/fcm/send"), ONE.1, &token]);
    let script = Script::start(&mut command);
    script.next("sends");
    while answered("503") < 2 {
        assert!(Instant::now() < until + PATIENCE, "it does not come back");
        thread::sleep(Duration::from_millis(50));
    }
    broker.restart();
    assert_eq!(script.next("success"), 1);
    assert_eq!(answered("200"), 1, "and no more after that");
    let mut mcs = identity.connect(&broker);
    assert_eq!(value(&mcs.message(), "n"), Some("1"));
    mcs.no_message();
    assert_eq!(answered("200"), 1);
}

#[test]
fn push_receiver_checks_in_registers_and_receives_plain_data_with_all_its_keys() {
    let broker = shared();
    let dir = npm("push-receiver");
    let script = Script::start(node(broker, &dir, "receive.cjs").arg(ONE.0));
    let token = script.next("token");
    let token = token.as_str().unwrap();
    let send = |n: u32| {
        let body =
            json!({ "to": token, "collapse_key": format!("k{n}"), "time_to_live": 60, "data": { "n": n, "x": "ü" } });
        let json = send_json(&broker.address("http"), ONE.1, &body).json();
        json["results"][0]["message_id"].as_str().unwrap_or_else(|| panic!("{json}")).to_owned()
    };
    // One may come before the connection, one after it.
    let first = send(1);
    script.next("connected");
    let second = send(2);
    let messages = [script.next("message"), script.next("message")];
    assert_eq!(messages.each_ref().map(|message| &message["persistentId"]), [&json!(first), &json!(second)]);
    let message = &messages[0];
    let pairs = message["appData"].as_array().unwrap();
    let pair = |key: &str| pairs.iter().find(|pair| pair["key"] == key).map(|pair| &pair["value"]);
    assert_eq!((pair("n"), pair("x")), (Some(&json!("1")), Some(&json!("ü"))), "{message}");
    // This client registers under its sender as subtype.
    assert_eq!(pair("subtype"), Some(&json!(ONE.0)));
    assert_eq!((&message["from"], &message["category"]), (&json!(ONE.0), &json!("com.example.app")));
    assert_eq!((&message["token"], &message["ttl"]), (&json!("k1"), &json!(60)));
    script.none("message");
}

#[test]
fn aracna_fcm_logs_in_has_its_pings_answered_and_logs_in_again_after_a_kill() {
    let mut broker = Broker::start();
    let dir = npm("aracna-fcm");
    let identity = check_in(&broker);
    let (id, token) = (identity.android_id.to_string(), identity.security_token.to_string());
    let port = broker.address("mcs").rsplit_once(':').unwrap().1.to_owned();
    let script = Script::start(node(&broker, &dir, "login.cjs").args([&id, &token, &port]));
    script.next("login");
    script.next("heartbeat");
    script.next("heartbeat");
    broker.kill();
    script.next("closed");
    broker.restart();
    script.next("login");
    script.next("heartbeat");
}
