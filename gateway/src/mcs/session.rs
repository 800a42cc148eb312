//! One device's MCS connection, after login.
//!
//! Owns the stream ids of both sides, the window of messages written and not acknowledged, and what each frame means.
//! Owns no socket, clock or queue: frames, deliveries and the time come in, [`Action`]s go out. `conn` drives it against TLS;
//! tests drive it with values.
//!
//! Invariants: every frame counts, in both directions, login frames being the first (device.md section 8.2). The number we
//! report passes a frame only when the acks in it are applied, since a device forgets what we confirm. No sequence is written
//! twice on one connection.
//!
//! Acks go out one set at a time: while one is unconfirmed, later ones gather in the next. That bounds what a connection may
//! have outstanding, whatever the device sends.
//!
//! **Upstream is not served yet.** A data stanza of a device is answered at once with `send_error`
//! (`service_not_available`) under the id its app gave it, so that nothing is lost in silence, and counts as handled. Stanzas
//! of the internal category are swallowed (device.md section 8.6).

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use bytes::Bytes;
use martlet_proto::{
    cluster::queue,
    device::mcs::{AppData, DataMessageStanza, HeartbeatAck, HeartbeatPing, StreamErrorStanza},
    limits::MCS_RECEIVED_IDS_MAX,
    mcs::{
        downstream,
        frame::{Frame, FrameError},
        stanza::{Ack, Stanza, ack_of},
    },
    message::{MessageId, Sequence},
};

use prometheus_client::encoding::EncodeLabelValue;

use super::{
    config::McsConfig,
    heartbeat::{Beat, Heartbeat},
};
use crate::attach::Acks;

/// Category of messages between a client and the service itself. Source: device.md section 8.6.
const INTERNAL_CATEGORY: &str = "com.google.android.gsf.gtalkservice";

/// Acks of messages written on the connection that gather beyond a whole window while those before are not applied. Deliveries stop
/// with their leader, so that many only come together when a leader takes no acks for long.
const GATHERED_MAX: usize = 16_384;

/// What the driver must do next, in this order.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Write this frame to the device, alone, and flush.
    Write(Bytes),
    /// Hand these to the node, and call [`Session::applied`] once they are on disk.
    Ack(Acks),
    /// End the connection; what is unacked stays queued.
    Close(CloseReason),
}

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum CloseReason {
    /// The device said Close.
    ByDevice,
    /// A newer connection of the device took over.
    Superseded,
    /// The gateway drains.
    Draining,
    /// Nothing was heard for too long.
    Silent,
    /// A ping stayed unanswered.
    Unanswered,
    /// The device broke the protocol.
    Protocol,
    /// A node sent more than its credit.
    Overrun,
    /// What it acknowledged could not be applied for too long. It says so again when it comes back.
    Unconfirmed,
}

/// What the login says about the session. See [`super::login`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traits {
    /// Ping interval the device wishes for.
    pub wished_ping: Option<Duration>,
    /// Setting `rmq2v`: data stanzas carry their stream id.
    pub explicit_stream_ids: bool,
    /// The app's id of an upstream message is its persistent id (`android-` clients), not its id.
    pub app_id_is_persistent: bool,
    /// Acks of the login are handed over and not confirmed yet.
    pub acks_pending: bool,
}

/// What became of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivered {
    /// An [`Action::Write`] holds it.
    Written,
    /// Written on this connection before.
    Duplicate,
    /// Its stored form cannot be shown to a device; skipped.
    Malformed,
}

#[derive(Debug)]
struct Unacked {
    stream_id: u32,
    sequence: Sequence,
    message_id: Option<MessageId>,
}

/// The value.
#[derive(Debug)]
pub struct Session {
    traits: Traits,
    unacked_max: usize,
    heartbeat: Heartbeat,
    /// Frames written, by us.
    sent: u32,
    /// Frames read, from the device.
    received: u32,
    /// The number we told last.
    reported: u32,
    window: VecDeque<Unacked>,
    written_through: Option<Sequence>,
    /// First frame whose acks are handed over and not applied.
    applying_from: Option<u32>,
    /// Acks that wait for those, and the first frame they came with.
    gathered: Acks,
    gathered_from: Option<u32>,
    /// Messages that fell out of the window unacknowledged.
    forgotten: u64,
    closed: bool,
    actions: VecDeque<Action>,
}

impl Session {
    /// A session after its login: one frame has passed each way.
    pub fn new(config: &McsConfig, traits: Traits, now: Instant) -> Self {
        Self {
            traits,
            unacked_max: config.unacked_max.max(1),
            heartbeat: Heartbeat::new(config, traits.wished_ping, now),
            sent: 1,
            received: 1,
            reported: 1,
            window: VecDeque::new(),
            written_through: None,
            // Nothing past the login is confirmed before the acks in it are.
            applying_from: traits.acks_pending.then_some(2),
            gathered: Acks::default(),
            gathered_from: None,
            forgotten: 0,
            closed: false,
            actions: VecDeque::new(),
        }
    }

    /// What to do next.
    pub fn next_action(&mut self) -> Option<Action> {
        let action = self.actions.pop_front();
        if self.actions.is_empty() {
            // An idle connection holds no buffer.
            self.actions = VecDeque::new();
        }
        action
    }

    /// Highest sequence written on this connection.
    pub fn written_through(&self) -> Option<Sequence> {
        self.written_through
    }

    /// Messages written and not acknowledged.
    pub fn unacked_len(&self) -> usize {
        self.window.len()
    }

    /// Messages that fell out of the window so far; they stay stored.
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// When the driver must call [`Session::at_deadline`] if nothing else happens first.
    pub fn deadline(&self) -> Instant {
        self.heartbeat.deadline()
    }

    /// Time passed.
    pub fn at_deadline(&mut self, now: Instant) {
        match self.heartbeat.at(now) {
            Beat::Wait => {}
            Beat::Ping => {
                let last_stream_id_received = self.news();
                self.write(&Stanza::HeartbeatPing(HeartbeatPing {
                    last_stream_id_received,
                    ..HeartbeatPing::default()
                }));
            }
            Beat::Unanswered => self.close(CloseReason::Unanswered),
            Beat::Silent => self.close(CloseReason::Silent),
        }
    }

    /// A message from the queue; the driver has checked that it is neither void nor expired.
    pub fn deliver(&mut self, sequence: Option<Sequence>, message: &queue::Message) -> Delivered {
        if sequence.is_some() && sequence <= self.written_through {
            return Delivered::Duplicate;
        }
        let Ok(mut stanza) = downstream::stanza(message, None) else { return Delivered::Malformed };
        stanza.last_stream_id_received = self.news();
        stanza.stream_id = self.traits.explicit_stream_ids.then(|| wire(self.sent.saturating_add(1)));
        self.write(&Stanza::Data(Box::new(stanza)));
        if let Some(sequence) = sequence {
            self.written_through = Some(sequence);
            let message_id = MessageId::from_bytes(&message.message_id);
            self.window.push_back(Unacked { stream_id: self.sent, sequence, message_id });
            if self.window.len() > self.unacked_max {
                self.window.pop_front();
                self.forgotten += 1;
            }
        }
        Delivered::Written
    }

    /// The next frame of the device, or what is wrong with its bytes.
    pub fn receive(&mut self, frame: Result<Frame, FrameError>, now: Instant) {
        if self.closed {
            return;
        }
        let Ok(frame) = frame else { return self.violation("bad-frame") };
        let Some(received) = self.received.checked_add(1) else { return self.violation("too-many-frames") };
        self.received = received;
        let Ok(stanza) = Stanza::decode(&frame) else { return self.violation("bad-stanza") };
        self.heartbeat.heard(matches!(stanza, Stanza::HeartbeatPing(_) | Stanza::HeartbeatAck(_)), now);
        if let Some(through) = stanza.acknowledged_through() {
            self.acknowledged_through(through);
        }
        match stanza {
            Stanza::HeartbeatPing(_) => self.answer_ping(),
            Stanza::Iq(iq) => match ack_of(&iq) {
                Ok(Ack::Selective(ids)) => self.acknowledged(&ids),
                // Its number is taken already.
                Ok(Ack::Stream | Ack::None) => {}
                Err(_) => return self.violation("bad-stanza"),
            },
            Stanza::Data(data) => self.upstream(&data),
            Stanza::Close => self.end(CloseReason::ByDevice),
            Stanza::LoginRequest(_) | Stanza::LoginResponse(_) => return self.violation("unexpected-tag"),
            Stanza::HeartbeatAck(_) | Stanza::StreamError(_) | Stanza::Obsolete(_) => {}
        }
        self.hand_over();
    }

    /// The acks handed over last are applied.
    pub fn applied(&mut self) {
        self.applying_from = None;
        self.hand_over();
    }

    /// Says Close to the device and ends.
    pub fn close(&mut self, reason: CloseReason) {
        if !self.closed {
            self.write(&Stanza::Close);
            self.end(reason);
        }
    }

    /// Acks that were never handed over, when the connection is at its end.
    pub fn into_unsent_acks(self) -> Acks {
        self.gathered
    }

    // ------------------------------------------------------------------------------------------------------- details

    /// Frames of the device up to here are done with: what they acknowledge is applied.
    fn settled(&self) -> u32 {
        self.applying_from.into_iter().chain(self.gathered_from).min().map_or(self.received, |first| first - 1)
    }

    /// The number to report, if the device does not know it yet; it counts as told.
    fn news(&mut self) -> Option<i32> {
        let settled = self.settled();
        if settled <= self.reported {
            return None;
        }
        self.reported = settled;
        Some(wire(settled))
    }

    /// At once, and always with the number (device.md section 8.3): it is what a device waits for.
    fn answer_ping(&mut self) {
        self.reported = self.reported.max(self.settled());
        let last_stream_id_received = Some(wire(self.reported));
        self.write(&Stanza::HeartbeatAck(HeartbeatAck { last_stream_id_received, ..HeartbeatAck::default() }));
    }

    /// Cumulative; a number beyond what was sent is a defect of the device and means nothing (DL-08).
    fn acknowledged_through(&mut self, through: u32) {
        if through > self.sent {
            return;
        }
        let len = self.window.partition_point(|unacked| unacked.stream_id <= through);
        let sequences: Vec<Sequence> = self.window.drain(..len).map(|unacked| unacked.sequence).collect();
        self.gather(sequences, Vec::new());
    }

    /// Selective; ids of earlier connections are the node's to find, others mean nothing.
    fn acknowledged(&mut self, ids: &[String]) {
        let (mut sequences, mut message_ids) = (Vec::new(), Vec::new());
        for id in ids.iter().filter_map(|id| id.parse::<MessageId>().ok()) {
            match self.window.iter().position(|unacked| unacked.message_id == Some(id)) {
                Some(at) => sequences.extend(self.window.remove(at).map(|unacked| unacked.sequence)),
                None => message_ids.push(id),
            }
        }
        self.gather(sequences, message_ids);
    }

    fn gather(&mut self, sequences: Vec<Sequence>, message_ids: Vec<MessageId>) {
        if self.window.is_empty() {
            self.window = VecDeque::new();
        }
        if sequences.is_empty() && message_ids.is_empty() {
            return;
        }
        if self.gathered.message_ids.len() + message_ids.len() > MCS_RECEIVED_IDS_MAX {
            return self.violation("too-many-acks");
        }
        if self.gathered.sequences.len() + sequences.len() > self.unacked_max + GATHERED_MAX {
            return self.close(CloseReason::Unconfirmed);
        }
        self.gathered.sequences.extend(sequences);
        self.gathered.message_ids.extend(message_ids);
        self.gathered_from.get_or_insert(self.received);
    }

    fn hand_over(&mut self) {
        if self.applying_from.is_none() && !self.gathered.is_empty() && !self.closed {
            self.applying_from = self.gathered_from.take();
            self.actions.push_back(Action::Ack(std::mem::take(&mut self.gathered)));
        }
    }

    fn upstream(&mut self, data: &DataMessageStanza) {
        if data.category == INTERNAL_CATEGORY {
            return;
        }
        let ids = [data.persistent_id.as_deref(), data.id.as_deref()];
        let [first, second] = if self.traits.app_id_is_persistent { ids } else { [ids[1], ids[0]] };
        let Some(id) = first.or(second).filter(|id| !id.is_empty()) else { return };
        let sender = data.to.as_deref().and_then(|to| to.split('@').next()).filter(|sender| !sender.is_empty());
        let pair = |key: &str, value: &str| AppData { key: key.into(), value: value.into() };
        let stanza = DataMessageStanza {
            from: sender.unwrap_or("gcm.googleapis.com").into(),
            category: data.category.clone(),
            app_data: vec![pair("message_type", "send_error"), pair("error", "service_not_available")],
            // What the app called its message: Chromium and microG both find it here (device.md section 9.4).
            persistent_id: Some(id.into()),
            last_stream_id_received: self.news(),
            ..DataMessageStanza::default()
        };
        self.write(&Stanza::Data(Box::new(stanza)));
    }

    fn violation(&mut self, kind: &str) {
        if !self.closed {
            self.write(&Stanza::StreamError(StreamErrorStanza { r#type: kind.into(), text: None }));
            self.end(CloseReason::Protocol);
        }
    }

    fn end(&mut self, reason: CloseReason) {
        if !self.closed {
            self.closed = true;
            self.actions.push_back(Action::Close(reason));
        }
    }

    fn write(&mut self, stanza: &Stanza) {
        if let (Some(bytes), false) = (stanza.encode(), self.closed) {
            self.sent = self.sent.saturating_add(1);
            self.actions.push_back(Action::Write(bytes));
        }
    }
}

/// A stream id as its field holds it.
fn wire(stream_id: u32) -> i32 {
    i32::try_from(stream_id).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests;
