//! Our library inside the processes of the cluster: slow and failing fsync, jumps of the wall clock.
//!
//! Owns the library (`interpose.c`, compiled when a run needs it) and one [`Control`] page a process, through which it is told
//! what to do and counts what it did. libfaketime would do for the clocks, but reads its file every second at best and counts
//! nothing: a jump that met nobody would look like one that was survived.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

const SOURCE: &str = include_str!("interpose.c");

/// Bytes of a control page.
const PAGE_BYTES: u64 = 4096;

/// A field of the page, as `interpose.c` lays it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Field {
    /// Microseconds added to each fsync.
    DelayMicros = 0,
    /// errno of each fsync; 0: none.
    Error = 1,
    /// Seconds added to the wall clock; negative in two's complement.
    ClockSecs = 2,
    /// Processes that loaded the library.
    Loads = 3,
    /// Fsyncs delayed.
    Delayed = 4,
    /// Fsyncs failed.
    Failed = 5,
    /// Readings of a shifted clock.
    Shifted = 6,
}

/// The compiled library.
#[derive(Debug, Clone)]
pub(super) struct Interposer {
    library: PathBuf,
}

impl Interposer {
    /// Compiles it into `dir`.
    ///
    /// # Errors
    /// When there is no C compiler, or it says no.
    pub(super) fn compile(dir: &Path) -> Result<Self> {
        let source = dir.join("interpose.c");
        let library = dir.join("interpose.so");
        fs::write(&source, SOURCE).with_context(|| format!("write {}", source.display()))?;
        let output = Command::new("cc")
            .args(["-shared", "-fPIC", "-O2", "-o"])
            .args([&library, &source])
            .arg("-ldl")
            .output()
            .context("start cc")?;
        if !output.status.success() {
            bail!("cc {}: {}", source.display(), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(Self { library })
    }

    /// Whether it takes effect on this executable: not on a static one.
    ///
    /// # Errors
    /// When it does not.
    pub(super) fn check(&self, executable: &Path, dir: &Path) -> Result<()> {
        let control = Control::new(&dir.join("probe.page"))?;
        let output = Command::new(executable).arg("--version").envs(self.environment(&control)).output()?;
        if !output.status.success() || control.get(Field::Loads)? == 0 {
            bail!("{} does not load it (statically linked?)", executable.display());
        }
        Ok(())
    }

    /// Variables of a process that obeys `control`.
    #[must_use]
    pub(super) fn environment(&self, control: &Control) -> Vec<(String, String)> {
        vec![
            ("LD_PRELOAD".to_owned(), self.library.display().to_string()),
            ("MARTLET_INTERPOSE".to_owned(), control.path.display().to_string()),
        ]
    }
}

/// The page of one process.
#[derive(Debug)]
pub(super) struct Control {
    path: PathBuf,
    file: File,
}

impl Control {
    /// A page that does nothing.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub(super) fn new(path: &Path) -> Result<Self> {
        let context = || format!("create {}", path.display());
        let file = File::options().create(true).truncate(true).read(true).write(true).open(path);
        let file = file.with_context(context)?;
        file.set_len(PAGE_BYTES).with_context(context)?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Sets a field; the process sees it at once.
    ///
    /// # Errors
    /// When the page cannot be written.
    pub(super) fn set(&self, field: Field, value: u64) -> Result<()> {
        let written = self.file.write_all_at(&value.to_ne_bytes(), field as u64 * 8);
        written.with_context(|| format!("write {}", self.path.display()))
    }

    /// Reads a field.
    ///
    /// # Errors
    /// When the page cannot be read.
    pub(super) fn get(&self, field: Field) -> Result<u64> {
        let mut bytes = [0; 8];
        let read = self.file.read_exact_at(&mut bytes, field as u64 * 8);
        read.with_context(|| format!("read {}", self.path.display()))?;
        Ok(u64::from_ne_bytes(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(program: &str, arguments: &[&str], environment: Vec<(String, String)>) -> (bool, String) {
        let output = Command::new(program).args(arguments).envs(environment).output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    }

    #[test]
    fn a_page_makes_fsync_fail_and_the_clock_jump_and_counts_both() {
        let dir = tempfile::tempdir().unwrap();
        let interposer = Interposer::compile(dir.path()).unwrap();
        let control = Control::new(&dir.path().join("page")).unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        let sync = ["--data", file.to_str().unwrap()];
        assert!(output("sync", &sync, interposer.environment(&control)).0);
        assert_eq!(control.get(Field::Loads).unwrap(), 1);
        assert_eq!(control.get(Field::Failed).unwrap(), 0);

        control.set(Field::Error, 5).unwrap();
        assert!(!output("sync", &sync, interposer.environment(&control)).0);
        assert!(control.get(Field::Failed).unwrap() > 0);

        let seconds = |environment| output("date", &["+%s"], environment).1.trim().parse::<i64>().unwrap();
        let before = seconds(Vec::new());
        control.set(Field::ClockSecs, (-3_600_i64).cast_unsigned()).unwrap();
        let jumped = seconds(interposer.environment(&control));
        assert!(jumped < before - 3_000, "{jumped} is not an hour before {before}");
        assert!(control.get(Field::Shifted).unwrap() > 0);
    }

    #[test]
    fn an_executable_that_loads_it_passes_the_check() {
        let dir = tempfile::tempdir().unwrap();
        let interposer = Interposer::compile(dir.path()).unwrap();
        interposer.check(Path::new("/bin/date"), dir.path()).unwrap();
    }
}
