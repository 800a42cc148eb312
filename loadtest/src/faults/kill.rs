//! kill -9: what a process had not made durable is gone with it, all else stays with the kernel.

use super::{Fault, Site, Step, Struck, on};
use crate::cluster::Member;

/// Kills these and starts them again.
#[derive(Debug)]
pub(super) struct Kill {
    pub(super) victims: Vec<Member>,
}

impl Fault for Kill {
    fn on(&self) -> String {
        on(&self.victims)
    }

    fn begin<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, Struck> {
        Box::pin(async move {
            site.touch(&self.victims);
            for &victim in &self.victims {
                site.cluster.process_mut(victim).kill()?;
            }
            Ok(Struck::Yes)
        })
    }

    fn end<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, ()> {
        Box::pin(site.revive(&self.victims))
    }
}
