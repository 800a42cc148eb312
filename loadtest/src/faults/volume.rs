//! A file system of its own for one node: ext4 in a file, mounted over a loop device.
//!
//! It can be filled to the last byte, and it can lose its power: what was synced stays, the rest is gone. Owns mount and image;
//! a volume that is dropped is unmounted.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};

/// Between two tries to unmount: a killed process lets go of its files a moment later.
const BUSY_RETRY: Duration = Duration::from_millis(100);

/// Tries to unmount.
const BUSY_TRIES: usize = 50;

/// Largest and smallest piece that filling takes, bytes.
const PIECES: (u64, u64) = (64 << 20, 4096);

/// One mounted file system.
#[derive(Debug)]
pub(super) struct Volume {
    image: PathBuf,
    mount: PathBuf,
    mounted: bool,
}

impl Volume {
    /// Makes a file system of `bytes` in the new file `image` (sparse: it takes what is written) and mounts it at `mount`.
    ///
    /// # Errors
    /// When the machine does not let us; it says why.
    pub(super) fn create(image: &Path, mount: &Path, bytes: u64) -> Result<Self> {
        let file = File::create(image).with_context(|| format!("create {}", image.display()))?;
        file.set_len(bytes)?;
        run("mkfs.ext4", &["-q", "-F", "-m", "0", path(image)?])?;
        fs::create_dir_all(mount).with_context(|| format!("create {}", mount.display()))?;
        let mut volume = Self { image: image.to_owned(), mount: mount.to_owned(), mounted: false };
        volume.mount()?;
        Ok(volume)
    }

    fn mount(&mut self) -> Result<()> {
        run("mount", &["-o", "loop", path(&self.image)?, path(&self.mount)?])?;
        self.mounted = true;
        Ok(())
    }

    fn unmount(&mut self) -> Result<()> {
        let mut last = Ok(());
        for _ in 0..BUSY_TRIES {
            last = run("umount", &[path(&self.mount)?]);
            if last.is_ok() {
                self.mounted = false;
                return Ok(());
            }
            std::thread::sleep(BUSY_RETRY);
        }
        last
    }

    /// Cuts the power: nothing that was not synced reaches the disk from now on.
    ///
    /// # Errors
    /// When the file system cannot be shut down.
    pub(super) fn cut_power(&self) -> Result<()> {
        run("xfs_io", &["-x", "-c", "shutdown", path(&self.mount)?])
    }

    /// Brings it back as the disk has it.
    ///
    /// # Errors
    /// When it cannot be unmounted or mounted.
    pub(super) fn power_on(&mut self) -> Result<()> {
        self.unmount()?;
        self.mount()
    }

    /// Takes all room that is left; the bytes taken.
    ///
    /// # Errors
    /// When the system says anything but "no space left".
    pub(super) fn fill(&self) -> Result<u64> {
        let ballast = self.ballast();
        let file = File::options().create(true).append(true).open(&ballast);
        let file = file.with_context(|| format!("create {}", ballast.display()))?;
        let (mut piece, least) = PIECES;
        let mut len = file.metadata()?.len();
        let before = len;
        while piece >= least {
            match fallocate(&file, FallocateFlags::empty(), len, piece) {
                Ok(()) => len += piece,
                Err(Errno::NOSPC) => piece /= 2,
                Err(error) => return Err(error).with_context(|| format!("fill {}", self.mount.display())),
            }
        }
        Ok(len - before)
    }

    /// Gives back what [`Volume::fill`] took.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub(super) fn free(&self) -> Result<()> {
        fs::remove_file(self.ballast()).with_context(|| format!("free {}", self.mount.display()))
    }

    fn ballast(&self) -> PathBuf {
        self.mount.join("ballast")
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        if self.mounted && self.unmount().is_err() {
            // Somebody still has a file open: it goes with the last one.
            drop(path(&self.mount).and_then(|mount| run("umount", &["-l", mount])));
        }
        drop(fs::remove_file(&self.image));
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("start {program}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {}: {}", arguments.join(" "), said.trim());
    }
    Ok(())
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}
