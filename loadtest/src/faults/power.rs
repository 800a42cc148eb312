//! Power loss: a node and everything that it had not synced are gone at the same moment.
//!
//! The process is stopped first, so that it sees no error and tells nobody anything; then its file system is shut down without
//! writing what is only in memory; then it is killed. What an fsync had returned for must be there afterwards.

use rustix::process::Signal;

use super::{Fault, Site, Step, Struck, on};
use crate::cluster::Member;

/// Cuts the power of these nodes at once.
#[derive(Debug)]
pub(super) struct PowerLoss {
    pub(super) victims: Vec<Member>,
}

impl PowerLoss {
    fn volumes(&self) -> impl Iterator<Item = usize> {
        self.victims.iter().filter_map(|victim| match victim {
            Member::Node(at) => Some(*at),
            Member::Gateway => None,
        })
    }
}

impl Fault for PowerLoss {
    fn on(&self) -> String {
        on(&self.victims)
    }

    fn begin<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, Struck> {
        Box::pin(async move {
            site.touch(&self.victims);
            for &victim in &self.victims {
                site.cluster.process(victim).signal(Signal::STOP)?;
            }
            for at in self.volumes() {
                site.volumes[at].cut_power()?;
            }
            for &victim in &self.victims {
                site.cluster.process_mut(victim).kill()?;
            }
            Ok(Struck::Yes)
        })
    }

    fn end<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, ()> {
        Box::pin(async move {
            for at in self.volumes() {
                site.volumes[at].power_on()?;
            }
            site.revive(&self.victims).await
        })
    }
}
