//! The newest meta state this node has applied: on disk first, then known to everyone on the node.
//!
//! Owns the file `meta-state` and the channel that watches, the opening of replicas and routing follow. A node serves from it also
//! while the meta group has no quorum, and at a start before the group has replayed its log. Invariant: what is published is on
//! disk, and revisions only rise.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use martlet_proto::cluster::meta::MetaState;
use prost::Message;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::checked_file::{self, FileError};
use crate::disk::Disk;

const MAGIC: &[u8; 8] = b"MARTLETm";
const NAME: &str = "meta-state";
const RETRY: Duration = Duration::from_secs(1);

/// Where the machine leaves what it has applied, and others find what is kept.
#[derive(Debug, Clone)]
pub struct Keeper {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    applied: Arc<watch::Sender<Arc<MetaState>>>,
    kept: Arc<watch::Sender<Arc<MetaState>>>,
}

impl Keeper {
    /// Reads what was kept; an empty state when nothing was.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path) -> Result<Self, FileError> {
        let path = dir.join(NAME);
        let state = match checked_file::read(&*disk, &path, MAGIC)? {
            None => MetaState::default(),
            Some(body) => MetaState::decode(&*body)
                .map_err(|error| FileError::Damaged { path: path.clone(), what: error.to_string() })?,
        };
        let state = Arc::new(state);
        Ok(Self {
            disk,
            path,
            applied: Arc::new(watch::channel(Arc::clone(&state)).0),
            kept: Arc::new(watch::channel(state).0),
        })
    }

    /// Takes a state that was applied; an older one than the newest is left aside (a replay comes by there).
    pub fn applied(&self, state: &MetaState) {
        self.applied.send_if_modified(|newest| {
            let newer = state.revision > newest.revision;
            if newer {
                *newest = Arc::new(state.clone());
            }
            newer
        });
    }

    /// The newest that was applied, on disk or not yet.
    pub fn newest(&self) -> Arc<MetaState> {
        Arc::clone(&self.applied.borrow())
    }

    /// What is kept, and every change of it.
    pub fn kept(&self) -> watch::Receiver<Arc<MetaState>> {
        self.kept.subscribe()
    }

    /// Writes and publishes what is applied until `end` fires. Owned by the node, which awaits it.
    pub async fn run(self, end: CancellationToken) {
        let mut applied = self.applied.subscribe();
        loop {
            let newest = Arc::clone(&applied.borrow_and_update());
            if newest.revision > self.kept.borrow().revision {
                let (disk, path, state) = (Arc::clone(&self.disk), self.path.clone(), Arc::clone(&newest));
                let written = tokio::task::spawn_blocking(move || {
                    checked_file::write(&*disk, &path, MAGIC, &state.encode_to_vec())
                })
                .await;
                match written {
                    Ok(Ok(())) => {
                        self.kept.send_replace(newest);
                        continue;
                    }
                    Ok(Err(error)) => {
                        tracing::error!(%error, "the meta state cannot be kept; watchers are told the last one that is")
                    }
                    Err(error) => tracing::error!(%error, "keeping the meta state was cut short"),
                }
                tokio::select! { () = end.cancelled() => return, () = tokio::time::sleep(RETRY) => continue }
            }
            tokio::select! {
                () = end.cancelled() => return,
                changed = applied.changed() => if changed.is_err() { return },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::RealDisk;

    fn revision(revision: u64) -> MetaState {
        MetaState { revision, ..MetaState::default() }
    }

    #[tokio::test]
    async fn what_is_published_is_on_disk_and_older_states_are_left_aside() {
        let dir = tempfile::tempdir().unwrap();
        let keeper = Keeper::open(Arc::new(RealDisk), dir.path()).unwrap();
        let mut kept = keeper.kept();
        let end = CancellationToken::new();
        let running = tokio_util::task::TaskTracker::new().spawn(keeper.clone().run(end.clone()));
        keeper.applied(&revision(4));
        keeper.applied(&revision(3));
        kept.wait_for(|state| state.revision == 4).await.unwrap();
        let again = Keeper::open(Arc::new(RealDisk), dir.path()).unwrap();
        assert_eq!(again.kept().borrow().revision, 4);
        end.cancel();
        running.await.unwrap();
    }
}
