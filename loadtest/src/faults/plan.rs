//! What a run does to the cluster, as a value: a seed and a set of kinds give the list of rounds, always the same.
//!
//! Owns the kinds and the draw. Knows no process: who leads and which file exists is found when a round comes; the round's `pick`
//! decides among them. The invariant: each kind comes once and alone before anything is mixed.

use std::{collections::BTreeMap, fmt, str::FromStr, time::Duration};

/// What can be done to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "`about` says what each does")]
pub enum Kind {
    KillLeader,
    KillFollower,
    KillGateway,
    KillAll,
    PauseLeader,
    PauseFollower,
    PauseGateway,
    RestartNode,
    RestartGateway,
    FlipLog,
    CutLog,
    FlipStore,
    CutStore,
    FlipBase,
    FlipKept,
    SlowFsync,
    FailFsync,
    DiskFull,
    DiskFullAll,
    PowerLoss,
    PowerLossAll,
    ClockJump,
    ClockJumpAll,
}

impl Kind {
    /// All, in the order of the table.
    pub const ALL: [Self; 23] = [
        Self::KillLeader,
        Self::KillFollower,
        Self::KillGateway,
        Self::KillAll,
        Self::PauseLeader,
        Self::PauseFollower,
        Self::PauseGateway,
        Self::RestartNode,
        Self::RestartGateway,
        Self::FlipLog,
        Self::CutLog,
        Self::FlipStore,
        Self::CutStore,
        Self::FlipBase,
        Self::FlipKept,
        Self::SlowFsync,
        Self::FailFsync,
        Self::DiskFull,
        Self::DiskFullAll,
        Self::PowerLoss,
        Self::PowerLossAll,
        Self::ClockJump,
        Self::ClockJumpAll,
    ];

    /// Its name on the command line, in the table and in the history.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.words().0
    }

    /// What it does.
    #[must_use]
    pub fn about(self) -> &'static str {
        self.words().1
    }

    fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::KillLeader => ("kill-leader", "kill -9 of a node that leads a shard"),
            Self::KillFollower => ("kill-follower", "kill -9 of a node that follows in a shard"),
            Self::KillGateway => ("kill-gateway", "kill -9 of the gateway"),
            Self::KillAll => ("kill-all", "kill -9 of all nodes and the gateway at once"),
            Self::PauseLeader => {
                ("pause-leader", "SIGSTOP of a leading node for longer than an election, then SIGCONT")
            }
            Self::PauseFollower => ("pause-follower", "the same of a following node"),
            Self::PauseGateway => ("pause-gateway", "the same of the gateway"),
            Self::RestartNode => ("restart-node", "SIGTERM of a node, then a new start"),
            Self::RestartGateway => ("restart-gateway", "SIGTERM of the gateway, then a new start"),
            Self::FlipLog => ("flip-log", "a bit of a synced record in a stopped node's log is flipped"),
            Self::CutLog => ("cut-log", "a segment of a stopped node's log is truncated"),
            Self::FlipStore => ("flip-store", "a bit of a stopped node's sled file is flipped"),
            Self::CutStore => ("cut-store", "a stopped node's sled file is truncated"),
            Self::FlipBase => ("flip-base", "a bit of a stopped node's base or redo file is flipped"),
            Self::FlipKept => ("flip-kept", "a bit of a stopped node's identity or kept meta state is flipped"),
            Self::SlowFsync => ("slow-fsync", "every fsync of one node or of all takes 50 to 300 ms more"),
            Self::FailFsync => ("fail-fsync", "every fsync of a node fails with EIO"),
            Self::DiskFull => ("disk-full", "a node's file system is filled, then freed; no restart"),
            Self::DiskFullAll => ("disk-full-all", "the same on all nodes at once"),
            Self::PowerLoss => ("power-loss", "a node and all that it had not synced are gone at once"),
            Self::PowerLossAll => ("power-loss-all", "the same on all nodes at once"),
            Self::ClockJump => ("clock-jump", "the wall clock of one process jumps an hour either way, and back"),
            Self::ClockJumpAll => ("clock-jump-all", "the same of all processes at once"),
        }
    }

    /// Whether it needs each node on a file system of its own.
    #[must_use]
    pub fn needs_volumes(self) -> bool {
        matches!(self, Self::DiskFull | Self::DiskFullAll | Self::PowerLoss | Self::PowerLossAll)
    }

    /// Whether it needs our library in the processes.
    #[must_use]
    pub fn needs_interposer(self) -> bool {
        matches!(self, Self::SlowFsync | Self::FailFsync | Self::ClockJump | Self::ClockJumpAll)
    }

    /// How long it lasts, milliseconds, least and most.
    fn hold_ms(self) -> (u64, u64) {
        match self {
            Self::KillLeader | Self::KillFollower | Self::KillGateway | Self::KillAll => (0, 2_500),
            // Longer than the lease and an election: 1.5 s each.
            Self::PauseLeader | Self::PauseFollower | Self::PauseGateway => (3_500, 7_000),
            Self::RestartNode | Self::RestartGateway => (0, 1_000),
            Self::FlipLog | Self::CutLog | Self::FlipStore | Self::CutStore | Self::FlipBase | Self::FlipKept => {
                (500, 2_000)
            }
            Self::SlowFsync | Self::ClockJump | Self::ClockJumpAll => (4_000, 8_000),
            Self::FailFsync => (500, 1_500),
            Self::DiskFull | Self::DiskFullAll => (6_000, 10_000),
            Self::PowerLoss | Self::PowerLossAll => (0, 2_500),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = || Self::ALL.map(Self::name).join(", ");
        Self::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| format!("there are {}", known()))
    }
}

/// Kinds that may come on top of another while it lasts: each is over by itself.
const ON_TOP: [Kind; 5] =
    [Kind::KillLeader, Kind::KillFollower, Kind::KillGateway, Kind::PauseFollower, Kind::RestartNode];

/// One thing that is done to the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Strike {
    /// What.
    pub kind: Kind,
    /// Decides whom it meets, and where.
    pub pick: u64,
    /// How long it lasts.
    pub hold: Duration,
}

/// One round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// From 1.
    pub number: usize,
    /// Load before it.
    pub lead: Duration,
    /// What happens.
    pub strike: Strike,
    /// What happens while it lasts.
    pub on_top: Option<Strike>,
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, lead, strike, on_top } = self;
        write!(f, "{number:4}  after {:4} ms  {} for {} ms", lead.as_millis(), strike.kind, strike.hold.as_millis())?;
        match on_top {
            Some(second) => write!(f, ", meanwhile {} for {} ms", second.kind, second.hold.as_millis()),
            None => Ok(()),
        }
    }
}

/// The rounds of a run, without end: each kind alone in the order given, then mixed.
#[derive(Debug, Clone)]
pub struct Rounds {
    kinds: Vec<Kind>,
    draw: Draw,
    number: usize,
    /// How often each kind came: one that fell behind is drawn first.
    came: BTreeMap<Kind, usize>,
}

impl Rounds {
    /// Of these kinds, at least one.
    #[must_use]
    pub fn new(seed: u64, kinds: &[Kind]) -> Self {
        assert!(!kinds.is_empty(), "a run has at least one kind");
        Self { kinds: kinds.to_vec(), draw: Draw(seed), number: 0, came: BTreeMap::new() }
    }

    fn strike(&mut self, kind: Kind) -> Strike {
        let (least, most) = kind.hold_ms();
        Strike {
            kind,
            pick: self.draw.number(),
            hold: Duration::from_millis(least + self.draw.below(most - least + 1)),
        }
    }

    /// A kind by chance, but never one that came twice more often than another.
    fn mixed(&mut self) -> Kind {
        let came = |kind: &Kind| self.came.get(kind).copied().unwrap_or(0);
        let least = self.kinds.iter().map(came).min().unwrap_or(0);
        let behind: Vec<Kind> = self.kinds.iter().copied().filter(|kind| came(kind) <= least + 1).collect();
        behind[usize::try_from(self.draw.below(behind.len() as u64)).unwrap_or(0)]
    }
}

impl Iterator for Rounds {
    type Item = Round;

    fn next(&mut self) -> Option<Round> {
        let alone = self.kinds.get(self.number).copied();
        let kind = alone.unwrap_or_else(|| self.mixed());
        *self.came.entry(kind).or_default() += 1;
        self.number += 1;
        let lead = Duration::from_millis(300 + self.draw.below(1_500));
        let strike = self.strike(kind);
        let candidates: Vec<Kind> = ON_TOP.into_iter().filter(|kind| self.kinds.contains(kind)).collect();
        let on_top = (alone.is_none() && !candidates.is_empty() && self.draw.below(2) == 0).then(|| {
            let at = self.draw.below(candidates.len() as u64);
            self.strike(candidates[usize::try_from(at).unwrap_or(0)])
        });
        Some(Round { number: self.number, lead, strike, on_top })
    }
}

/// SplitMix64: a seed in a bug report must give the same rounds in every version of every library.
#[derive(Debug, Clone)]
pub struct Draw(pub u64);

impl Draw {
    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; 0 when that is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number().checked_rem(bound).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_rounds_and_another_seed_others() {
        let rounds = |seed| Rounds::new(seed, &Kind::ALL).take(200).collect::<Vec<_>>();
        assert_eq!(rounds(7), rounds(7));
        assert_ne!(rounds(7), rounds(8));
    }

    #[test]
    fn the_draw_of_a_seed_stays() {
        // SplitMix64's published values for seed 1234567.
        let mut draw = Draw(1_234_567);
        let first: Vec<u64> = (0..3).map(|_| draw.number()).collect();
        assert_eq!(first, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn each_kind_comes_alone_before_anything_is_mixed_and_all_keep_coming() {
        let rounds: Vec<Round> = Rounds::new(3, &Kind::ALL).take(23 * 8).collect();
        let first: Vec<Kind> = rounds[..23].iter().map(|round| round.strike.kind).collect();
        assert_eq!(first, Kind::ALL);
        assert!(rounds[..23].iter().all(|round| round.on_top.is_none()));
        assert!(rounds[23..].iter().any(|round| round.on_top.is_some()));
        for kind in Kind::ALL {
            let count = rounds.iter().filter(|round| round.strike.kind == kind).count();
            assert!((6..=11).contains(&count), "{kind} came {count} times");
        }
    }

    #[test]
    fn a_pause_outlasts_lease_and_election_and_what_comes_on_top_was_asked_for() {
        let kinds = [Kind::PauseLeader, Kind::KillGateway];
        for round in Rounds::new(1, &kinds).take(100) {
            if round.strike.kind == Kind::PauseLeader {
                assert!(round.strike.hold > Duration::from_secs(3));
            }
            assert!(round.on_top.is_none_or(|second| second.kind == Kind::KillGateway));
        }
    }

    #[test]
    fn names_read_back_and_a_wrong_one_lists_them() {
        for kind in Kind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
        }
        assert!("kill".parse::<Kind>().unwrap_err().contains("kill-leader"));
    }
}
