//! SIGTERM and a new start: the process drains, hands over what it leads, and ends with success.

use super::{Fault, Site, Step, Struck, on};
use crate::cluster::Member;

/// Ends one in order and starts it again.
#[derive(Debug)]
pub(super) struct Restart {
    pub(super) victim: Member,
}

impl Fault for Restart {
    fn on(&self) -> String {
        on(&[self.victim])
    }

    fn begin<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, Struck> {
        Box::pin(async move {
            site.touch(&[self.victim]);
            if let Err(error) = site.cluster.process_mut(self.victim).end().await {
                site.found(format!("SIGTERM: {error:#}"));
            }
            Ok(Struck::Yes)
        })
    }

    fn end<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, ()> {
        Box::pin(async move { site.revive(&[self.victim]).await })
    }
}
