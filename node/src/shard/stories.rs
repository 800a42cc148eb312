//! What became of messages, for a while after.
//!
//! Owns how long the ends that `apply` tells are remembered: so many of one shard, and so long; the oldest go first. In memory, on every
//! replica, so that a change of leader loses none; a replica that starts knows those since its last checkpoint. A message that waits is
//! in its mailbox and nowhere else. The invariant: memory is bounded by [`Stories::new`]'s number, whatever is applied.

use std::{collections::VecDeque, time::Duration};

use martlet_proto::{message::MessageId, tag::DeviceTag, token::RegistrationId};

use crate::state::Ended;

/// The ends of one shard's messages.
#[derive(Debug)]
pub struct Stories {
    ended: VecDeque<Ended>,
    most: usize,
    keep_ms: u64,
}

impl Stories {
    /// None yet; at most `most`, each for `keep` of shard time.
    pub fn new(most: usize, keep: Duration) -> Self {
        let keep_ms = u64::try_from(keep.as_millis()).unwrap_or(u64::MAX);
        Self { ended: VecDeque::new(), most, keep_ms }
    }

    /// Takes what an entry ended. Returns how many had to go before their time.
    pub fn applied(&mut self, ended: Vec<Ended>, now_ms: u64) -> usize {
        let from_ms = now_ms.saturating_sub(self.keep_ms);
        while self.ended.front().is_some_and(|oldest| oldest.ended_ms < from_ms) {
            self.ended.pop_front();
        }
        self.ended.extend(ended);
        let excess = self.ended.len().saturating_sub(self.most);
        self.ended.drain(..excess);
        excess
    }

    /// How a message ended; the last time, if its id was used twice.
    pub fn of_message(&self, id: MessageId, now_ms: u64) -> Option<Ended> {
        self.newest_first(now_ms).find(|ended| ended.message_id == id)
    }

    /// How the last `most` messages of a registration ended, newest first.
    pub fn of_registration(&self, device: DeviceTag, id: RegistrationId, most: usize, now_ms: u64) -> Vec<Ended> {
        let of = self.newest_first(now_ms).filter(|ended| (ended.device, ended.registration) == (device, id));
        of.take(most).collect()
    }

    fn newest_first(&self, now_ms: u64) -> impl Iterator<Item = Ended> + '_ {
        let from_ms = now_ms.saturating_sub(self.keep_ms);
        self.ended.iter().rev().copied().take_while(move |ended| ended.ended_ms >= from_ms)
    }
}

#[cfg(test)]
mod tests {
    use martlet_proto::message::Sequence;

    use super::*;
    use crate::state::End;

    fn ended(n: u64, ended_ms: u64) -> Ended {
        Ended {
            message_id: MessageId { micros: n, random: n },
            device: DeviceTag(n % 2),
            registration: RegistrationId([1; 16]),
            sequence: Sequence { incarnation: 0, index: n, position: 0 },
            term: 1,
            accepted_ms: 0,
            ended_ms,
            end: End::Expired,
        }
    }

    fn id(n: u64) -> MessageId {
        MessageId { micros: n, random: n }
    }

    #[test]
    fn a_message_has_its_end_for_so_long_and_no_longer() {
        let mut stories = Stories::new(10, Duration::from_secs(1));
        assert_eq!(stories.applied(vec![ended(1, 100), ended(2, 900)], 900), 0);
        assert_eq!(stories.of_message(id(1), 1_100), Some(ended(1, 100)));
        assert_eq!(stories.of_message(id(1), 1_101), None, "also before anything else comes");
        stories.applied(vec![ended(3, 1_101)], 1_101);
        assert_eq!(stories.ended.len(), 2);
    }

    #[test]
    fn no_more_than_so_many_are_kept_and_what_goes_early_is_told() {
        let mut stories = Stories::new(3, Duration::from_secs(1));
        assert_eq!(stories.applied((0..5).map(|n| ended(n, 1)).collect(), 1), 2);
        assert_eq!((stories.of_message(id(1), 1), stories.of_message(id(2), 1)), (None, Some(ended(2, 1))));
        assert_eq!(stories.ended.len(), 3);
    }

    #[test]
    fn a_registrations_last_messages_come_newest_first() {
        let mut stories = Stories::new(10, Duration::from_secs(1));
        stories.applied((0..8).map(|n| ended(n, 1)).collect(), 1);
        let found = stories.of_registration(DeviceTag(0), RegistrationId([1; 16]), 3, 1);
        assert_eq!(found.iter().map(|one| one.message_id.micros).collect::<Vec<_>>(), [6, 4, 2]);
        assert_eq!(stories.of_registration(DeviceTag(0), RegistrationId([2; 16]), 3, 1), []);
    }
}
