//! One process of a local cluster: the real executable, its log, and what can be done to it from outside.
//!
//! Owns the child: whoever drops a [`Process`] leaves none behind. Kills are SIGKILL: what the process had not made durable is gone.

use std::{
    fs,
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    clock::RunClock,
    cluster::{Layout, path},
    http::HttpClient,
};

/// Patience for a process to become ready, or to end.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// Between two looks at a process that is to become ready, or to end.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// One process of the cluster and how it is started.
#[derive(Debug)]
pub struct Process {
    pub(crate) name: String,
    role: &'static str,
    config: PathBuf,
    log: PathBuf,
    environment: Vec<(String, String)>,
    /// Port of its health endpoints.
    pub(crate) admin: u16,
    child: Option<Child>,
}

impl Process {
    pub(crate) fn new(
        layout: &Layout,
        name: String,
        role: &'static str,
        config: &str,
        admin: u16,
        environment: Vec<(String, String)>,
    ) -> Result<Self> {
        let file = layout.dir.join(format!("{name}.toml"));
        fs::write(&file, config).with_context(|| format!("write {}", file.display()))?;
        let log = layout.dir.join(format!("{name}.log"));
        Ok(Self { name, role, config: file, log, environment, admin, child: None })
    }

    pub(crate) fn spawn(&mut self, layout: &Layout) -> Result<()> {
        let log = fs::OpenOptions::new().create(true).append(true).open(&self.log)?;
        let child = Command::new(&layout.martlet)
            .args([self.role, "--config", path(&self.config)?])
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", layout.martlet.display()))?;
        self.child = Some(child);
        Ok(())
    }

    /// Its process id while it was not seen to end.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// What it and its forerunners printed.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Length of the log, bytes: a mark for [`Process::said_since`].
    #[must_use]
    pub fn log_len(&self) -> u64 {
        fs::metadata(&self.log).map_or(0, |metadata| metadata.len())
    }

    /// What was printed behind a mark of [`Process::log_len`].
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn said_since(&self, mark: u64) -> Result<String> {
        let mut file = fs::File::open(&self.log).with_context(|| format!("read {}", self.log.display()))?;
        file.seek(SeekFrom::Start(mark))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// How it ended, once it has; it is gone then.
    ///
    /// # Errors
    /// When the system cannot say.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        let Some(child) = self.child.as_mut() else { return Ok(None) };
        let status = child.try_wait()?;
        if status.is_some() {
            self.child = None;
        }
        Ok(status)
    }

    /// Waits for it to end by itself; none: it did not within `patience`.
    ///
    /// # Errors
    /// When the system cannot say.
    pub async fn wait_end(&mut self, patience: Duration) -> Result<Option<ExitStatus>> {
        let clock = RunClock::begin();
        loop {
            if let Some(status) = self.ended()? {
                return Ok(Some(status));
            }
            if clock.elapsed() > patience || self.child.is_none() {
                return Ok(None);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Whether a probe (`/readyz`) is answered 200 now; else what it says.
    ///
    /// # Errors
    /// What the probe said, or why it could not be asked.
    pub async fn ask(&self, probe: &str) -> Result<()> {
        let http = HttpClient::new(&format!("http://127.0.0.1:{}", self.admin))?;
        let answer = http.get(probe).await?;
        if answer.status != 200 {
            bail!("{}", String::from_utf8_lossy(&answer.body).trim().replace('\n', "; "));
        }
        Ok(())
    }

    /// What its metrics say of one that has no labels.
    ///
    /// # Errors
    /// When it does not answer, or has no such metric.
    pub async fn metric(&self, name: &str) -> Result<f64> {
        let http = HttpClient::new(&format!("http://127.0.0.1:{}", self.admin))?;
        let answer = http.get("/metrics").await?;
        let text = String::from_utf8_lossy(&answer.body);
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        value.with_context(|| format!("{} does not tell {name}", self.name))
    }

    pub(crate) async fn wait(&mut self, probe: &str) -> Result<()> {
        let clock = RunClock::begin();
        loop {
            let Err(said) = self.ask(probe).await else { return Ok(()) };
            if let Some(status) = self.ended()? {
                bail!("{} ended with {status} before it was ready; its log is {}", self.name, self.log.display());
            }
            if clock.elapsed() > READY_TIMEOUT {
                let log = self.log.display();
                bail!("{} was not ready within {READY_TIMEOUT:?} ({said:#}); its log is {log}", self.name);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When it is not running.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let id = self.pid().with_context(|| format!("{} is not running", self.name))?;
        let pid = i32::try_from(id).ok().and_then(Pid::from_raw).context("a process id is above 0")?;
        kill_process(pid, signal).with_context(|| format!("signal {}", self.name))
    }

    /// Ends it with SIGKILL.
    ///
    /// # Errors
    /// When it is not running.
    pub fn kill(&mut self) -> Result<()> {
        let child = self.child.as_mut().with_context(|| format!("{} is not running", self.name))?;
        child.kill().with_context(|| format!("kill {}", self.name))?;
        child.wait()?;
        self.child = None;
        Ok(())
    }

    /// Ends it in order: SIGTERM, and SIGKILL when that is not enough. One that does not run is ended.
    ///
    /// # Errors
    /// When it ended with a failure, or had to be killed.
    pub async fn end(&mut self) -> Result<()> {
        if self.child.is_none() {
            return Ok(());
        }
        self.signal(Signal::TERM)?;
        match self.wait_end(READY_TIMEOUT).await? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("{} ended with {status}; its log is {}", self.name, self.log.display()),
            None => {
                self.kill()?;
                let log = self.log.display();
                bail!("{} did not end within {READY_TIMEOUT:?} of SIGTERM; its log is {log}", self.name)
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Whoever ends early still leaves no process behind.
        if let Some(child) = &mut self.child {
            drop(child.kill());
            drop(child.wait());
        }
    }
}
