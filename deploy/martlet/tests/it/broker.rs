//! A `standalone` broker as a child process: the built executable in a directory of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use martlet_loadtest::ports;
use serde_json::Value;
use tempfile::TempDir;

use crate::app_server::Http;

/// The executable under test.
pub(crate) const MARTLET: &str = env!("CARGO_BIN_EXE_martlet");

/// Two projects of every broker here: sender id and server key.
pub(crate) const ONE: (&str, &str) = ("900100200300", "key-of-project-one");
/// The other one.
pub(crate) const TWO: (&str, &str) = ("900100200301", "key-of-project-two");

/// Patience for a start: the machine may be busy with other tests.
const READY: Duration = Duration::from_secs(90);

/// A running broker. Dropped, it is killed and its directory removed.
pub(crate) struct Broker {
    child: Option<Child>,
    dir: TempDir,
    arguments: Vec<String>,
    /// What `connection.json` says.
    pub(crate) connection: Value,
}

impl Broker {
    /// Starts one on free ports, with both projects.
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same with further arguments.
    pub(crate) fn start_with(further: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        let data = dir.path().join("data");
        let ports = ["--http", "--https", "--mcs", "--admin", "--grpc"].into_iter().zip(ports::free(5).unwrap());
        let mut arguments = vec!["standalone".to_owned(), "--data".to_owned(), data.to_str().unwrap().to_owned()];
        for (flag, port) in ports {
            arguments.extend([flag.to_owned(), format!("127.0.0.1:{port}")]);
        }
        for (sender_id, key) in [ONE, TWO] {
            arguments.extend(["--project".to_owned(), format!("{sender_id}={key}")]);
        }
        arguments.extend(further.iter().map(ToString::to_string));
        let mut broker = Self { child: None, dir, arguments, connection: Value::Null };
        broker.restart();
        broker
    }

    /// Starts the process again in the same directory, on the same ports, and waits until it is ready.
    pub(crate) fn restart(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log()).unwrap();
        let mut command = Command::new(MARTLET);
        command
            .args(&self.arguments)
            .env(RESERVE.0, RESERVE.1)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        // A broker that was killed leaves the file of its last start; the new one removes it before it is ready.
        let _ = fs::remove_file(self.data().join("connection.json"));
        self.child = Some(command.spawn().unwrap());
        self.wait_ready();
    }

    fn wait_ready(&mut self) {
        let file = self.data().join("connection.json");
        let until = Instant::now() + READY;
        loop {
            if let Ok(text) = fs::read_to_string(&file) {
                self.connection = serde_json::from_str(&text).unwrap();
                return;
            }
            if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().unwrap()) {
                panic!("the broker ended with {status}:\n{}", self.log_text());
            }
            assert!(Instant::now() < until, "the broker was not ready within {READY:?}:\n{}", self.log_text());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills the process with SIGKILL.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Asks the process to end (SIGTERM) and waits for it.
    pub(crate) fn terminate(&mut self) -> ExitStatus {
        self.ask_to_end();
        self.ended()
    }

    /// Asks the process to end (SIGTERM).
    pub(crate) fn ask_to_end(&self) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.pid()).unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    /// Waits until the process has ended.
    pub(crate) fn ended(&mut self) -> ExitStatus {
        self.child.take().unwrap().wait().unwrap()
    }

    fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Memory of the process that is resident, bytes. Not of the shared broker, which a shell stands before.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() << 10
    }

    /// Sum of the samples of `/metrics` that begin so.
    pub(crate) fn metric(&self, begin: &str) -> f64 {
        let answer = Http::connect(&self.address("admin")).request("GET", "/metrics", &[], b"");
        let samples = answer.text().lines().filter(|line| line.starts_with(begin));
        samples.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    /// The data directory.
    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// PEM file of the CA.
    pub(crate) fn ca_file(&self) -> PathBuf {
        self.data().join("ca/ca.pem")
    }

    /// A value of `connection.json` without its scheme.
    pub(crate) fn address(&self, what: &str) -> String {
        let text = self.connection[what].as_str().unwrap();
        text.split_once("://").map_or(text, |(_, address)| address).to_owned()
    }

    /// What the process has logged.
    pub(crate) fn log_text(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("log")
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A developer's disk that is full of other things must not fail the tests; the least reserve in bytes stays.
const RESERVE: (&str, &str) = ("MARTLET_NODE__DISK_RESERVE_PERCENT", "0");

/// The broker that all undisturbing tests of this process share. It ends with the process: a shell between holds a pipe to us
/// and kills it when the pipe closes.
pub(crate) fn shared() -> &'static Broker {
    static SHARED: OnceLock<Broker> = OnceLock::new();
    SHARED.get_or_init(|| {
        let mut broker = Broker::start();
        broker.kill();
        let log = fs::OpenOptions::new().create(true).append(true).open(broker.log()).unwrap();
        let _ = fs::remove_file(broker.data().join("connection.json"));
        // The directory goes too: nobody else is left to remove it.
        let script = r#"dir=$1; shift; "$@" <&- & broker=$!; read -r _; kill -9 $broker; wait $broker; rm -rf "$dir""#;
        let child = Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(broker.dir.path())
            .arg(MARTLET)
            .args(&broker.arguments)
            .env(RESERVE.0, RESERVE.1)
            .stdin(Stdio::piped())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        broker.child = Some(child);
        broker.wait_ready();
        broker
    })
}

/// Runs the executable to its end; status, standard output and standard error.
pub(crate) fn martlet(arguments: &[&str]) -> (ExitStatus, String, String) {
    let output = Command::new(MARTLET).args(arguments).stdin(Stdio::null()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status, text(output.stdout), text(output.stderr))
}

/// A path as an argument.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
