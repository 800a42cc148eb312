//! SIGSTOP and SIGCONT: a process that is away for longer than an election and comes back believing what it believed.

use rustix::process::Signal;

use super::{Fault, Site, Step, Struck, on};
use crate::cluster::Member;

/// Stops one and lets it go on.
#[derive(Debug)]
pub(super) struct Pause {
    pub(super) victim: Member,
}

impl Fault for Pause {
    fn on(&self) -> String {
        on(&[self.victim])
    }

    fn begin<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, Struck> {
        Box::pin(async move {
            site.touch(&[self.victim]);
            site.cluster.process(self.victim).signal(Signal::STOP)?;
            Ok(Struck::Yes)
        })
    }

    fn end<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, ()> {
        Box::pin(async move {
            site.cluster.process(self.victim).signal(Signal::CONT)?;
            site.revive(&[self.victim]).await
        })
    }
}
