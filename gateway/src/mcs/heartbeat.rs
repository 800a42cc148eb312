//! When the server pings a device, and when silence ends its connection. A value: time comes in, a decision goes out.
//!
//! Source: device.md section 8.4. Clients differ: some answer pings, some answer a ping with a ping, some never say a word
//! after their login. So a missing answer ends a connection only if that device has answered before; all others live until
//! `silence_max`.

use std::time::{Duration, Instant};

use super::config::McsConfig;

/// Shortest interval a device may ask for.
pub const INTERVAL_MIN: Duration = Duration::from_secs(1);
/// Longest interval a device may ask for.
pub const INTERVAL_MAX: Duration = Duration::from_secs(30 * 60);

/// What time brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beat {
    /// Nothing is due.
    Wait,
    /// Send a ping.
    Ping,
    /// The device answered pings before, and did not answer this one.
    Unanswered,
    /// Nothing was heard for longer than any client is silent.
    Silent,
}

/// The heartbeat of one connection.
#[derive(Debug)]
pub struct Heartbeat {
    /// The device's wish: ping at this interval, whatever else is said.
    wished: Option<Duration>,
    ping_after: Duration,
    ping_timeout: Duration,
    silence_max: Duration,
    last_heard: Instant,
    next_ping: Instant,
    /// When the oldest ping without any frame after it was sent.
    unanswered_since: Option<Instant>,
    answers: bool,
}

impl Heartbeat {
    /// Starts at login. `wished` is what the device asked for, clamped to [`INTERVAL_MIN`]..=[`INTERVAL_MAX`] here.
    pub fn new(config: &McsConfig, wished: Option<Duration>, now: Instant) -> Self {
        let wished = wished.map(|interval| interval.clamp(INTERVAL_MIN, INTERVAL_MAX));
        Self {
            wished,
            ping_after: config.ping_after,
            ping_timeout: config.ping_timeout,
            silence_max: config.silence_max,
            last_heard: now,
            next_ping: now + wished.unwrap_or(config.ping_after),
            unanswered_since: None,
            answers: false,
        }
    }

    /// Any frame came. `beat` says whether it was a heartbeat, ping or ack: go-fcm-receiver answers a ping with a ping.
    pub fn heard(&mut self, beat: bool, now: Instant) {
        self.last_heard = now;
        if self.unanswered_since.take().is_some() && beat {
            self.answers = true;
        }
        if self.wished.is_none() {
            self.next_ping = now + self.ping_after;
        }
    }

    /// When [`Heartbeat::at`] has something to say, if nothing is heard before.
    pub fn deadline(&self) -> Instant {
        let mut deadline = self.next_ping.min(self.last_heard + self.silence_max);
        if let (true, Some(since)) = (self.answers, self.unanswered_since) {
            deadline = deadline.min(since + self.ping_timeout);
        }
        deadline
    }

    /// What is due now; a ping is counted as sent.
    pub fn at(&mut self, now: Instant) -> Beat {
        if self.answers && self.unanswered_since.is_some_and(|since| now >= since + self.ping_timeout) {
            return Beat::Unanswered;
        }
        if now >= self.last_heard + self.silence_max {
            return Beat::Silent;
        }
        if now >= self.next_ping {
            self.next_ping = now + self.wished.unwrap_or(self.ping_after);
            self.unanswered_since.get_or_insert(now);
            return Beat::Ping;
        }
        Beat::Wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const MINUTE: Duration = Duration::from_secs(60);

    fn start() -> Instant {
        #[expect(clippy::disallowed_methods, reason = "an instant cannot be made otherwise; the test moves it by hand")]
        Instant::now()
    }

    fn heartbeat(wished: Option<Duration>, now: Instant) -> Heartbeat {
        Heartbeat::new(&McsConfig::default(), wished, now)
    }

    #[test]
    fn mc_17_core_a_wished_interval_makes_the_server_ping_at_it_whatever_is_heard() {
        let t0 = start();
        let mut beat = heartbeat(Some(10 * SECOND), t0);
        beat.heard(false, t0 + 9 * SECOND);
        assert_eq!(beat.deadline(), t0 + 10 * SECOND);
        assert_eq!(beat.at(t0 + 10 * SECOND), Beat::Ping);
        assert_eq!(beat.deadline(), t0 + 20 * SECOND);
    }

    #[test]
    fn mc_17_core_a_wish_is_clamped_to_a_second_and_half_an_hour() {
        let t0 = start();
        assert_eq!(heartbeat(Some(Duration::from_millis(1)), t0).deadline(), t0 + SECOND);
        let mut long = heartbeat(Some(1000 * MINUTE), t0);
        assert_eq!(long.at(t0 + 29 * MINUTE), Beat::Wait);
        assert_eq!(long.at(t0 + 30 * MINUTE), Beat::Ping);
    }

    #[test]
    fn without_a_wish_the_server_pings_after_a_quarter_of_an_hour_of_silence() {
        let t0 = start();
        let mut beat = heartbeat(None, t0);
        beat.heard(false, t0 + 10 * MINUTE);
        assert_eq!(beat.at(t0 + 15 * MINUTE), Beat::Wait);
        assert_eq!(beat.at(t0 + 25 * MINUTE), Beat::Ping);
    }

    #[test]
    fn a_device_that_has_answered_before_must_answer_within_the_timeout() {
        let t0 = start();
        let mut beat = heartbeat(Some(5 * MINUTE), t0);
        assert_eq!(beat.at(t0 + 5 * MINUTE), Beat::Ping);
        beat.heard(true, t0 + 5 * MINUTE + SECOND);
        assert_eq!(beat.at(t0 + 10 * MINUTE), Beat::Ping);
        assert_eq!(beat.deadline(), t0 + 11 * MINUTE);
        assert_eq!(beat.at(t0 + 11 * MINUTE), Beat::Unanswered);
    }

    #[test]
    fn a_ping_sent_every_second_does_not_put_off_the_end_of_a_device_that_answered_before() {
        let t0 = start();
        let mut beat = heartbeat(Some(SECOND), t0);
        assert_eq!(beat.at(t0 + SECOND), Beat::Ping);
        beat.heard(true, t0 + SECOND);
        for second in 2..=61 {
            assert_eq!(beat.at(t0 + second * SECOND), Beat::Ping);
        }
        assert_eq!(beat.at(t0 + 62 * SECOND), Beat::Unanswered);
    }

    #[test]
    fn mc_18_core_a_device_that_answers_pings_with_pings_is_kept() {
        let t0 = start();
        let mut beat = heartbeat(Some(MINUTE), t0);
        for minute in 1..=200 {
            assert_eq!(beat.at(t0 + minute * MINUTE), Beat::Ping);
            beat.heard(true, t0 + minute * MINUTE + SECOND);
        }
    }

    #[test]
    fn mc_19_core_a_device_that_never_says_a_word_is_kept_half_an_hour_and_closed_later() {
        let t0 = start();
        let mut beat = heartbeat(None, t0);
        assert_eq!(beat.at(t0 + 15 * MINUTE), Beat::Ping);
        assert_eq!(beat.at(t0 + 30 * MINUTE), Beat::Ping);
        assert_eq!(beat.at(t0 + 31 * MINUTE), Beat::Wait);
        assert_eq!(beat.deadline(), t0 + 40 * MINUTE);
        assert_eq!(beat.at(t0 + 40 * MINUTE), Beat::Silent);
    }

    #[test]
    fn a_message_from_a_device_that_never_answered_does_not_oblige_it_to_answer() {
        let t0 = start();
        let mut beat = heartbeat(Some(MINUTE), t0);
        assert_eq!(beat.at(t0 + MINUTE), Beat::Ping);
        beat.heard(false, t0 + MINUTE + SECOND);
        assert_eq!(beat.at(t0 + 2 * MINUTE), Beat::Ping);
        assert_eq!(beat.at(t0 + 3 * MINUTE), Beat::Ping);
        assert_eq!(beat.at(t0 + 4 * MINUTE), Beat::Ping);
    }
}
