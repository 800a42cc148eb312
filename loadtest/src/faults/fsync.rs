//! Disks that are slow to sync, and disks that fail to.
//!
//! A node whose log cannot be synced must end (a second fsync would succeed and prove nothing); nobody is told that anything is
//! stored meanwhile.

use std::time::Duration;

use anyhow::Result;

use super::{Fault, Site, Step, Struck, interposer::Field, on};
use crate::cluster::Member;

/// EIO.
const EIO: u64 = 5;

/// Under load a node syncs many times in this time, and so must have ended after it.
const END_PATIENCE: Duration = Duration::from_secs(20);

/// Every fsync takes longer.
#[derive(Debug)]
pub(super) struct SlowFsync {
    pub(super) victims: Vec<Member>,
    pub(super) delay: Duration,
}

/// Every fsync fails, until the node has ended.
#[derive(Debug)]
pub(super) struct FailFsync {
    pub(super) victim: Member,
}

fn set(site: &Site, victims: &[Member], field: Field, value: u64) -> Result<()> {
    victims.iter().filter_map(|victim| site.controls.get(victim)).try_for_each(|control| control.set(field, value))
}

impl Fault for SlowFsync {
    fn on(&self) -> String {
        format!("{} by {} ms", on(&self.victims), self.delay.as_millis())
    }

    fn begin<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, Struck> {
        Box::pin(async move {
            let micros = u64::try_from(self.delay.as_micros()).unwrap_or(u64::MAX);
            set(site, &self.victims, Field::Delayed, 0)?;
            set(site, &self.victims, Field::DelayMicros, micros)?;
            Ok(Struck::Yes)
        })
    }

    fn end<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, ()> {
        Box::pin(async move {
            set(site, &self.victims, Field::DelayMicros, 0)?;
            for victim in &self.victims {
                if site.controls[victim].get(Field::Delayed)? == 0 {
                    site.found(format!("no run: no fsync of {victim} was delayed"));
                }
            }
            Ok(())
        })
    }
}

impl Fault for FailFsync {
    fn on(&self) -> String {
        on(&[self.victim])
    }

    fn begin<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, Struck> {
        Box::pin(async move {
            site.touch(&[self.victim]);
            set(site, &[self.victim], Field::Failed, 0)?;
            set(site, &[self.victim], Field::Error, EIO)?;
            let ended = site.cluster.process_mut(self.victim).wait_end(END_PATIENCE).await?;
            match (ended, site.controls[&self.victim].get(Field::Failed)?) {
                (_, 0) => site.found(format!("no run: no fsync of {} failed", self.victim)),
                (None, failed) => {
                    site.found(format!(
                        "{failed} fsyncs of {} failed within {END_PATIENCE:?} and it goes on",
                        self.victim
                    ));
                }
                (Some(status), _) if status.success() => {
                    site.found(format!("{} ended with success after a failed fsync", self.victim));
                }
                (Some(_), _) => {}
            }
            Ok(Struck::Yes)
        })
    }

    fn end<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, ()> {
        Box::pin(async move {
            set(site, &[self.victim], Field::Error, 0)?;
            site.revive(&[self.victim]).await
        })
    }
}
