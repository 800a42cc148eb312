//! The log's disk, with its fdatasync calls counted and timed.
//!
//! A rim around a [`Disk`]: passes everything on and changes nothing.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use prometheus_client::metrics::{counter::Counter, histogram::Histogram};

use crate::{
    clock::Clock,
    disk::{Disk, DiskFile, Space},
    metrics::Metrics,
};

/// A disk whose syncs are counted.
#[derive(Debug)]
pub(crate) struct Metered {
    disk: Arc<dyn Disk>,
    meter: Meter,
}

#[derive(Debug, Clone)]
struct Meter {
    syncs: Counter,
    seconds: Histogram,
    clock: Arc<dyn Clock>,
}

impl Metered {
    /// Counts what is synced on `disk` as syncs of the log.
    pub(crate) fn log(disk: Arc<dyn Disk>, metrics: &Metrics, clock: Arc<dyn Clock>) -> Self {
        let (syncs, seconds) = (metrics.log_fdatasyncs.clone(), metrics.log_fdatasync_seconds.clone());
        Self { disk, meter: Meter { syncs, seconds, clock } }
    }

    fn file(&self, file: Box<dyn DiskFile>) -> Box<dyn DiskFile> {
        Box::new(MeteredFile { file, meter: self.meter.clone() })
    }
}

impl Disk for Metered {
    fn create(&self, path: &Path, len: u64) -> io::Result<Box<dyn DiskFile>> {
        self.disk.create(path, len).map(|file| self.file(file))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        self.disk.open(path).map(|file| self.file(file))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.remove(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        self.disk.list(dir)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.disk.sync_dir(dir)
    }

    fn space(&self, dir: &Path) -> io::Result<Space> {
        self.disk.space(dir)
    }
}

#[derive(Debug)]
struct MeteredFile {
    file: Box<dyn DiskFile>,
    meter: Meter,
}

impl DiskFile for MeteredFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_at(offset, bytes)
    }

    fn sync_data(&self) -> io::Result<()> {
        let begun = self.meter.clock.now();
        self.file.sync_data()?;
        self.meter.syncs.inc();
        self.meter.seconds.observe(self.meter.clock.now().saturating_duration_since(begun).as_secs_f64());
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{clock::SystemClock, disk::RealDisk};

    #[test]
    fn every_sync_is_counted_and_the_bytes_are_those_of_the_disk_below() {
        let dir = tempfile::tempdir().unwrap();
        let metrics = Metrics::default();
        let disk = Metered::log(Arc::new(RealDisk), &metrics, Arc::new(SystemClock));
        let file = disk.create(&dir.path().join("a"), 0).unwrap();
        file.write_at(0, b"abc").unwrap();
        file.sync_data().unwrap();
        file.sync_data().unwrap();
        let mut back = [0; 3];
        disk.open(&dir.path().join("a")).unwrap().read_at(0, &mut back).unwrap();
        assert_eq!((&back, metrics.log_fdatasyncs.get()), (b"abc", 2));
    }
}
