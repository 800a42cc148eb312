//! Damaged files: a node is stopped, a bit of one of its files is flipped or the file is cut, and the node is started.
//!
//! It must refuse by the file's name, or rebuild what is damaged and say so; it must never serve it in silence. A bit of the log's
//! live bytes, of an identity or of a kept meta state is always looked at, so that going on without a word is a finding. A bit of
//! the sled file may lie where no row is: there the ledger judges what came of it. Afterwards the file is made whole again, where
//! the node left it as it was, and the node goes on.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};

use super::{Fault, Site, Step, Struck, log_files, on, plan::Draw};
use crate::{clock::RunClock, cluster::Member};

/// Patience for a node to refuse, to rebuild, or to serve.
const VERDICT_PATIENCE: Duration = Duration::from_secs(30);

/// A node that says that something is damaged is given this long to rebuild it.
const REBUILD_PATIENCE: Duration = Duration::from_secs(10);

/// Which file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// A segment of the log.
    Log,
    /// The file of sled.
    Store,
    /// A base or redo file.
    Base,
    /// Identity or kept meta state.
    Kept,
}

/// How.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// One bit.
    Flip,
    /// Everything from there on is gone.
    Cut,
}

/// What was done to which file.
#[derive(Debug)]
struct Done {
    file: PathBuf,
    offset: u64,
    /// The file before.
    whole: Vec<u8>,
    /// The file after.
    damaged: Vec<u8>,
    /// Copy of the store before, where the file belongs to it.
    store: Option<PathBuf>,
}

/// What a node made of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Refused,
    Serves,
}

/// Damages one file of one node.
#[derive(Debug)]
pub(super) struct Damage {
    victim: usize,
    family: Family,
    how: How,
    draw: Draw,
    done: Option<Done>,
    answer: Option<Answer>,
}

impl Damage {
    pub(super) fn new(victim: usize, family: Family, how: How, pick: u64) -> Self {
        Self { victim, family, how, draw: Draw(pick), done: None, answer: None }
    }

    /// File and offset that are to be damaged; none: there is nothing yet.
    fn aim(&mut self, data: &Path) -> Result<Option<(PathBuf, u64)>> {
        if self.family == Family::Log {
            let live = log_files::live(&data.join("log"))?;
            let Some(at) = index(&mut self.draw, live.len()) else { return Ok(None) };
            let offset = live[at].offset + self.draw.below(live[at].len);
            return Ok(Some((live[at].file.clone(), offset)));
        }
        let mut files = match self.family {
            Family::Kept => files(data, 0)?,
            Family::Store => files(&data.join("store/sled"), 3)?,
            _ => files(&data.join("store"), 3)?,
        };
        files.retain(|file| {
            let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let is_empty = fs::metadata(file).map_or(true, |metadata| metadata.len() == 0);
            !is_empty
                && match self.family {
                    Family::Log => false,
                    Family::Store => name == "db",
                    Family::Base => !file.starts_with(data.join("store/sled")),
                    Family::Kept => name != "lock" && name != "ballast",
                }
        });
        let Some(at) = index(&mut self.draw, files.len()) else { return Ok(None) };
        let file = files.swap_remove(at);
        let bytes = fs::read(&file)?;
        // Where there are only zeros there is nothing to lose.
        let told: Vec<usize> = (0..bytes.len()).filter(|&at| bytes[at] != 0).collect();
        let Some(at) = index(&mut self.draw, told.len()) else { return Ok(None) };
        Ok(Some((file, told[at] as u64)))
    }

    fn damage(&mut self, data: &Path) -> Result<Option<Done>> {
        let Some((file, offset)) = self.aim(data)? else { return Ok(None) };
        let whole = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
        let at = usize::try_from(offset)?;
        let store = matches!(self.family, Family::Store | Family::Base).then(|| data.with_extension("before"));
        if let Some(copy) = &store {
            copy_dir(&data.join("store"), copy)?;
        }
        let mut damaged = whole.clone();
        match self.how {
            How::Flip => damaged[at] ^= 1 << self.draw.below(8),
            How::Cut => damaged.truncate(at),
        }
        rewrite(&file, &damaged, at)?;
        Ok(Some(Done { file, offset, whole, damaged, store }))
    }

    /// Waits for what the node makes of it.
    async fn answer(&self, site: &mut Site, done: &Done, mark: u64) -> Result<Answer> {
        let member = Member::Node(self.victim);
        let clock = RunClock::begin();
        let mut told_at = None;
        loop {
            let said = site.cluster.process(member).said_since(mark)?;
            if let Some(status) = site.cluster.process_mut(member).ended()? {
                if !names(&said, &done.file) {
                    let (file, offset) = (done.file.display(), done.offset);
                    site.found(format!("{member} ended with {status} and does not name {file} (damaged at {offset})"));
                }
                return Ok(Answer::Refused);
            }
            if site.cluster.process(member).ask("/readyz").await.is_ok() {
                let must_look = matches!(self.family, Family::Log | Family::Kept);
                if must_look && !names(&said, &done.file) {
                    let (file, offset) = (done.file.display(), done.offset);
                    site.found(format!("{member} serves in silence with {file} damaged at {offset}"));
                }
                return Ok(Answer::Serves);
            }
            if names(&said, &done.file) {
                let told = *told_at.get_or_insert_with(|| clock.elapsed());
                if clock.elapsed() - told > REBUILD_PATIENCE {
                    // It lives and refuses what is damaged.
                    return Ok(Answer::Refused);
                }
            }
            if clock.elapsed() > VERDICT_PATIENCE {
                site.found(format!("{member} neither serves nor says what is wrong with {}", done.file.display()));
                return Ok(Answer::Refused);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Stops the node and undoes the damage, where the node has left the file alone.
    fn repair(&self, site: &mut Site) -> Result<()> {
        let Some(done) = &self.done else { return Ok(()) };
        let member = Member::Node(self.victim);
        let process = site.cluster.process_mut(member);
        if process.ended()?.is_none() && process.pid().is_some() {
            process.kill()?;
        }
        // sled rewrites its file while it looks at it, so all of the store is put back: it is then as of an earlier checkpoint, as
        // after a crash before the later ones, and the log has what is missing. Where it has not, the node refuses.
        if let Some(copy) = &done.store {
            let store = site.cluster.node_data(self.victim).join("store");
            fs::remove_dir_all(&store).with_context(|| format!("remove {}", store.display()))?;
            return copy_dir(copy, &store);
        }
        match fs::read(&done.file) {
            Ok(now) if now == done.damaged => {
                let at = usize::try_from(done.offset)?;
                rewrite(&done.file, &done.whole, at)
            }
            // Rewritten: what there is now is the node's own, and an old file in its place would be damage.
            _ => Ok(()),
        }
    }
}

/// Whether the node's words point at the file.
fn names(said: &str, file: &Path) -> bool {
    let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    // sled has one file, called `db`; its directory or the replica in it is what can be named.
    let also = if name == "db" { "store" } else { name };
    said.lines().any(|line| line.contains(name) || line.contains(also))
}

fn index(draw: &mut Draw, len: usize) -> Option<usize> {
    (len > 0).then(|| usize::try_from(draw.below(len as u64)).unwrap_or(0))
}

/// Files below a directory, `depth` levels down, in order; a directory that is missing has none.
fn files(dir: &Path, depth: usize) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    if !dir.exists() {
        return Ok(found);
    }
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let path = entry?.path();
        if path.is_file() {
            found.push(path);
        } else if depth > 0 && path.is_dir() {
            found.extend(files(&path, depth - 1)?);
        }
    }
    found.sort();
    Ok(found)
}

/// Makes `to` a copy of the directory `from`, whatever it was before; synced, since the power may go next.
fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        fs::remove_dir_all(to).with_context(|| format!("remove {}", to.display()))?;
    }
    fs::create_dir_all(to).with_context(|| format!("create {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("read {}", from.display()))? {
        let path = entry?.path();
        let copy = to.join(path.file_name().context("an entry of a directory has a name")?);
        if path.is_dir() {
            copy_dir(&path, &copy)?;
        } else {
            fs::copy(&path, &copy).with_context(|| format!("copy {}", path.display()))?;
            File::open(&copy)?.sync_all()?;
        }
    }
    File::open(to)?.sync_all().with_context(|| format!("sync {}", to.display()))
}

/// Makes the file's content from `at` on that of `bytes`, in place: it stays the same file, with the same holes.
fn rewrite(file: &Path, bytes: &[u8], at: usize) -> Result<()> {
    let context = || format!("write {}", file.display());
    let open = File::options().write(true).open(file).with_context(context)?;
    open.set_len(bytes.len() as u64).with_context(context)?;
    open.write_all_at(&bytes[at.min(bytes.len())..], at as u64).with_context(context)?;
    open.sync_all().with_context(context)
}

impl Fault for Damage {
    fn on(&self) -> String {
        let member = on(&[Member::Node(self.victim)]);
        match &self.done {
            Some(done) => {
                let file = done.file.file_name().unwrap_or_default().to_string_lossy();
                let answer = if self.answer == Some(Answer::Serves) { "it serves" } else { "refused" };
                format!("{member} {file}:{}, {answer}", done.offset)
            }
            None => member,
        }
    }

    fn begin<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, Struck> {
        Box::pin(async move {
            let member = Member::Node(self.victim);
            site.touch(&[member]);
            // Half of the logs end with the mark of a clean stop.
            if self.draw.below(2) == 0 {
                site.cluster.process_mut(member).kill()?;
            } else if let Err(error) = site.cluster.process_mut(member).end().await {
                site.found(format!("SIGTERM: {error:#}"));
            }
            let data = site.cluster.node_data(self.victim);
            let Some(done) = self.damage(&data)? else {
                return Ok(Struck::No("there was no such file, or nothing in it".to_owned()));
            };
            let mark = site.cluster.process(member).log_len();
            site.cluster.start_member(member)?;
            self.answer = Some(self.answer(site, &done, mark).await?);
            self.done = Some(done);
            Ok(Struck::Yes)
        })
    }

    fn end<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, ()> {
        Box::pin(async move {
            let member = Member::Node(self.victim);
            let refused = self.answer == Some(Answer::Refused);
            // Damage that shows only when it is read stops a replica, which then waits for its file.
            let stopped = |(at, status): &(usize, martlet_proto::cluster::admin::NodeStatus)| {
                *at == self.victim && status.groups.iter().any(|group| !group.stopped.is_empty())
            };
            if refused || site.status().await.iter().any(stopped) {
                self.repair(site)?;
            }
            site.revive(&[member]).await
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flip_and_a_cut_are_undone_and_the_same_pick_aims_at_the_same_byte() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path();
        let data = &data.join("node-1");
        fs::create_dir_all(data.join("store/sled")).unwrap();
        let file = data.join("store/sled/db");
        let whole: Vec<u8> = (0..5_000_u32).map(|n| if n < 100 { 0 } else { n as u8 | 1 }).collect();
        for how in [How::Flip, How::Cut] {
            let mut offsets = Vec::new();
            for _ in 0..2 {
                fs::write(&file, &whole).unwrap();
                let done = Damage::new(0, Family::Store, how, 11).damage(data).unwrap().unwrap();
                assert_eq!(fs::read(&file).unwrap(), done.damaged);
                assert_ne!(done.damaged, whole);
                assert!(done.offset >= 100, "zeros hold nothing");
                rewrite(&file, &done.whole, usize::try_from(done.offset).unwrap()).unwrap();
                assert_eq!(fs::read(&file).unwrap(), whole);
                let copy = done.store.unwrap();
                assert_eq!(fs::read(copy.join("sled/db")).unwrap(), whole, "the copy is from before");
                offsets.push(done.offset);
            }
            assert_eq!(offsets[0], offsets[1]);
        }
    }

    #[test]
    fn the_families_keep_apart_and_an_empty_one_aims_at_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path();
        fs::create_dir_all(data.join("store/sled")).unwrap();
        fs::write(data.join("lock"), "").unwrap();
        fs::write(data.join("identity"), "me").unwrap();
        let aim = |family| Damage::new(0, family, How::Flip, 5).aim(data).unwrap().map(|(file, _)| file);
        assert_eq!(aim(Family::Kept), Some(data.join("identity")));
        assert_eq!((aim(Family::Store), aim(Family::Base)), (None, None));
        fs::write(data.join("store/base-3"), "rows").unwrap();
        assert_eq!(aim(Family::Base), Some(data.join("store/base-3")));
    }

    #[test]
    fn a_node_that_names_the_file_is_told_from_one_that_does_not() {
        let file = Path::new("/d/log/0000000000000002.seg");
        assert!(names("martlet: log damaged at 0000000000000002.seg:4096: checksum", file));
        assert!(!names("leads shard 2", file));
    }
}
