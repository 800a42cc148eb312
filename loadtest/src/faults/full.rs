//! Full disks: a node's file system is filled to the last byte and freed again.
//!
//! Nothing is restarted: sends are refused for a while, what is stored stays, and the node goes on by itself when there is room.

use super::{Fault, Site, Step, Struck, on};
use crate::cluster::Member;

/// Fills the file systems of these nodes.
#[derive(Debug)]
pub(super) struct DiskFull {
    pub(super) victims: Vec<Member>,
}

impl DiskFull {
    fn volumes(&self) -> impl Iterator<Item = usize> {
        self.victims.iter().filter_map(|victim| match victim {
            Member::Node(at) => Some(*at),
            Member::Gateway => None,
        })
    }
}

impl Fault for DiskFull {
    fn on(&self) -> String {
        on(&self.victims)
    }

    fn begin<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, Struck> {
        Box::pin(async move {
            site.touch(&self.victims);
            for at in self.volumes() {
                if site.volumes[at].fill()? == 0 {
                    site.found(format!("no run: the disk of node-{} was full before", at + 1));
                }
            }
            Ok(Struck::Yes)
        })
    }

    fn end<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, ()> {
        Box::pin(async move {
            for at in self.volumes() {
                // What it gave back in the meantime was taken by nobody else: it stayed full only if there is little now.
                site.volumes[at].free()?;
            }
            for &victim in &self.victims {
                if let Some(status) = site.cluster.process_mut(victim).ended()? {
                    let log = site.cluster.process(victim).log().display().to_string();
                    site.found(format!("{victim} ended with {status} on a full disk; its log is {log}"));
                }
            }
            site.revive(&self.victims).await
        })
    }
}
