//! Ports for processes and nodes that are started, stopped and started again by a run or a test.
//!
//! They lie below those that the system hands out by itself: while a process is down, its port must not become the local end of
//! somebody's connection, or a listener of a run beside this one, or it cannot be started again.

use std::{
    collections::BTreeSet,
    io,
    net::TcpListener,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::{clock::RunClock, faults::plan::Draw};

/// First and last. Linux hands out ports from 32,768 on.
const RANGE: (u16, u16) = (10_000, 32_000);

/// Ports looked at before it is given up, for each that is wanted.
const LOOKS: usize = 1_000;

/// How often this process has asked.
static ASKED: AtomicU64 = AtomicU64::new(0);

/// Ports of loopback that were free a moment ago, all different.
///
/// # Errors
/// When none is found.
pub fn free(count: usize) -> io::Result<Vec<u16>> {
    let asked = ASKED.fetch_add(1, Ordering::Relaxed);
    let mut draw = Draw(RunClock::wall_micros() ^ u64::from(std::process::id()) << 40 ^ asked << 56);
    let mut found = BTreeSet::new();
    let mut held = Vec::new();
    for _ in 0..LOOKS * count {
        if found.len() == count {
            break;
        }
        let port = RANGE.0 + u16::try_from(draw.below(u64::from(RANGE.1 - RANGE.0))).unwrap_or(0);
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port))
            && found.insert(port)
        {
            // Until all are found: two that ask at once do not get the same.
            held.push(listener);
        }
    }
    match found.len() == count {
        true => Ok(found.into_iter().collect()),
        false => Err(io::Error::new(io::ErrorKind::AddrInUse, format!("no {count} free ports in {RANGE:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_different_free_and_none_that_the_system_hands_out() {
        let (mut all, other) = (free(20).unwrap(), free(20).unwrap());
        all.extend(other);
        assert!(all.iter().all(|port| (RANGE.0..RANGE.1).contains(port)));
        let held: Vec<_> = all[..20].iter().map(|port| TcpListener::bind(("127.0.0.1", *port)).unwrap()).collect();
        assert_eq!(held.len(), 20);
        assert_eq!(all[..20].iter().collect::<BTreeSet<_>>().len(), 20);
    }
}
