//! The fault command as a test: processes that are killed, paused, ended and damaged under load.
//!
//! The whole set of kinds, and hours of it, is `martlet-loadtest faults`; here are a few that every machine can do.

use std::time::Duration;

use martlet_loadtest::faults::{self, plan::Kind};
use tempfile::TempDir;

use crate::broker::MARTLET;

/// `MARTLET_FAULT_SEED` asks for other rounds of the same kinds.
const SEED: u64 = 5;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promise_4_promise_5_accepted_messages_survive_pauses_restarts_and_damaged_files() {
    let seed = std::env::var("MARTLET_FAULT_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(SEED);
    let kinds =
        vec![Kind::KillGateway, Kind::PauseLeader, Kind::RestartNode, Kind::FlipLog, Kind::CutLog, Kind::FlipKept];
    let dir = TempDir::new().unwrap();
    let history = std::env::temp_dir().join(format!("martlet-faults-{seed}-{}.jsonl", std::process::id()));
    let options = faults::Options {
        seed,
        time: Duration::from_secs(300),
        rounds: kinds.len(),
        kinds,
        devices: 16,
        rate: 40.0,
        nodes: 3,
        shards: 4,
        martlet: MARTLET.into(),
        dir: dir.path().to_owned(),
        history: Some(history.clone()),
        // Other tests run at the same time: here the bound only ends a run that stands still. The command's own is 20 s.
        recover_within: Duration::from_secs(280),
        unknown_min: 0,
    };
    let report = faults::run(&options).await.unwrap();
    println!("{}", report.table());
    if report.verdict != "kept" {
        let (kept, table) = (dir.keep(), report.table());
        panic!("MARTLET_FAULT_SEED={seed}; history {}, logs below {}\n{table}", history.display(), kept.display());
    }
    assert!(report.violations.is_empty());
    assert_eq!((report.total.rounds, report.total.lost), (6, 0));
    std::fs::remove_file(history).unwrap();
}
