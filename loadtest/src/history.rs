//! The history of a run: one JSON event a line, as checkers outside this repository read it too.
//!
//! Owns the event format, its writer and its reader. Says nothing about right and wrong: the [`ledger`](crate::ledger) judges.
//! The invariant: a line is written whole and flushed before what it announces may be seen (`send-invoked` before the request
//! leaves), so that killing the recorder loses at most its last line.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, BufWriter, Write as _},
    path::Path,
    sync::Mutex,
};

use serde::{Deserialize, Serialize};

/// One event; `t` is in seconds from one clock for all files of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Seconds since the run began.
    pub t: f64,
    /// What happened.
    #[serde(flatten)]
    pub what: What,
}

/// What happened. `op` names one attempt to send one message to one registration token (or one upstream message).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the fields carry the words of the format: op, token, device, tenant, conn")]
pub enum What {
    /// The device has its token.
    Register {
        token: String,
        device: String,
        tenant: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        app: Option<String>,
    },
    /// Removal of the token completed.
    Unregister { token: String },
    /// The device's login is done.
    Connected {
        device: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        session: Option<String>,
    },
    /// The device's connection is gone.
    Disconnected {
        device: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        session: Option<String>,
    },
    /// Before the request leaves.
    SendInvoked {
        op: String,
        token: String,
        tenant: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ttl: Option<f64>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        collapse_key: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        priority: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        receipt: Option<bool>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sha: Option<String>,
    },
    /// Success was reported to the app server.
    SendAcked {
        op: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        message_id: Option<String>,
    },
    /// A definite refusal: the message must never arrive.
    SendFailed {
        op: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// The message may or may not arrive.
    SendUnknown {
        op: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// The device got it.
    Delivered {
        device: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        op: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        message_id: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tenant: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        app: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        token: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        session: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sha: Option<String>,
    },
    /// The device acked it; `confirmed`: the server has shown that it saw the ack.
    DeviceAcked {
        device: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        op: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        message_id: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        confirmed: Option<bool>,
    },
    /// The device was told that its queue overflowed.
    DeletedMessages {
        device: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        token: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tenant: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        app: Option<String>,
    },
    /// The server's own account of a message it dropped.
    Dropped {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        op: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        message_id: Option<String>,
        reason: DropReason,
    },
    /// A delivery receipt reached the app server.
    ReceiptDelivered {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        op: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        message_id: Option<String>,
        tenant: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        conn: Option<String>,
    },
    /// XMPP bind done.
    CcsConnected { tenant: String, conn: String },
    /// XMPP connection gone.
    CcsDisconnected { tenant: String, conn: String },
    /// Before the device sends upstream.
    UpInvoked {
        op: String,
        device: String,
        tenant: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ttl: Option<f64>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sha: Option<String>,
    },
    /// The broker acked the device's stanza.
    UpAcked { op: String },
    /// A definite refusal of an upstream message.
    UpFailed { op: String },
    /// An upstream message may or may not arrive.
    UpUnknown { op: String },
    /// The app server got an upstream message.
    UpDelivered {
        op: String,
        tenant: String,
        conn: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        device: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sha: Option<String>,
    },
    /// The app server acked it.
    UpAckSent { op: String, tenant: String, conn: String },
    /// What the harness did to the cluster.
    Fault { name: String, phase: Phase },
    /// Recording stopped on purpose, after every device was on line long enough to drain.
    End {},
    /// A type of somebody else's (`x-…`): kept out of the judgement.
    #[serde(other)]
    Other,
}

/// Why the server dropped a message, in the words of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DropReason {
    /// Its time to live ran out.
    Ttl,
    /// A newer one with its collapse key came.
    Collapse,
    /// The limit of stored messages.
    Limit,
    /// The registration died.
    Unregister,
    /// An operator took it back.
    Recall,
}

/// Edge of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "they say it")]
pub enum Phase {
    Start,
    End,
}

impl What {
    /// Name of the device it happened to, where the event or the name of its op (`…@device`) tells it.
    fn device(&self) -> Option<&str> {
        match self {
            Self::Register { device, .. }
            | Self::Connected { device, .. }
            | Self::Disconnected { device, .. }
            | Self::Delivered { device, .. }
            | Self::DeviceAcked { device, .. }
            | Self::DeletedMessages { device, .. }
            | Self::UpInvoked { device, .. } => Some(device),
            Self::SendInvoked { op, .. }
            | Self::SendAcked { op, .. }
            | Self::SendFailed { op, .. }
            | Self::SendUnknown { op, .. } => op.rsplit_once('@').map(|(_, device)| device),
            Self::Unregister { .. }
            | Self::Dropped { .. }
            | Self::ReceiptDelivered { .. }
            | Self::CcsConnected { .. }
            | Self::CcsDisconnected { .. }
            | Self::UpAcked { .. }
            | Self::UpFailed { .. }
            | Self::UpUnknown { .. }
            | Self::UpDelivered { .. }
            | Self::UpAckSent { .. }
            | Self::Fault { .. }
            | Self::End {}
            | Self::Other => None,
        }
    }

    /// Whether it happened to a device `dN` whose number is a multiple of `every`, or to none.
    fn is_sampled(&self, every: usize) -> bool {
        let number = self.device().and_then(|device| device.strip_prefix('d')?.parse::<usize>().ok());
        number.is_none_or(|number| number.is_multiple_of(every))
    }
}

/// Keeps the events of a run in memory and, when asked to, in a file; shared by all its tasks.
#[derive(Debug)]
pub struct Recorder {
    /// One device in so many is recorded.
    every: usize,
    kept: Mutex<Kept>,
}

#[derive(Debug)]
struct Kept {
    events: Vec<Event>,
    file: Option<BufWriter<File>>,
    /// The first write error: a history with a hole is none.
    broken: Option<io::Error>,
}

impl Recorder {
    /// Records to memory, and to `file` when one is named.
    ///
    /// # Errors
    /// When the file cannot be created.
    pub fn new(file: Option<&Path>) -> io::Result<Self> {
        Self::of_sample(file, 1)
    }

    /// As [`Recorder::new`], but of the devices `dN` only those whose number is a multiple of `every` are recorded: all that happened to
    /// them, so that they can be judged.
    ///
    /// # Errors
    /// As [`Recorder::new`].
    pub fn of_sample(file: Option<&Path>, every: usize) -> io::Result<Self> {
        let file = file.map(File::create).transpose()?.map(BufWriter::new);
        Ok(Self { every, kept: Mutex::new(Kept { events: Vec::new(), file, broken: None }) })
    }

    /// Adds one event at `t` seconds; on return it is in the file.
    pub fn record(&self, t: f64, what: What) {
        if self.every > 1 && !what.is_sampled(self.every) {
            return;
        }
        let event = Event { t, what };
        let mut kept = self.kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(file) = &mut kept.file
            && let Err(error) = write_line(file, &event)
        {
            kept.broken.get_or_insert(error);
        }
        kept.events.push(event);
    }

    /// The events so far, in the order in which they were recorded.
    ///
    /// # Errors
    /// The first write that failed: what the file holds is not the history then.
    pub fn finish(self) -> io::Result<Vec<Event>> {
        let kept = self.kept.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        match kept.broken {
            Some(error) => Err(error),
            None => Ok(kept.events),
        }
    }
}

fn write_line(file: &mut BufWriter<File>, event: &Event) -> io::Result<()> {
    serde_json::to_writer(&mut *file, event)?;
    file.write_all(b"\n")?;
    file.flush()
}

/// Reads a history. A last line that was cut by the end of its recorder is left out.
///
/// # Errors
/// Names the line that is not an event.
pub fn read(path: &Path) -> io::Result<Vec<Event>> {
    let lines = BufReader::new(File::open(path)?).lines().collect::<io::Result<Vec<_>>>()?;
    let mut events = Vec::with_capacity(lines.len());
    for (at, line) in lines.iter().enumerate() {
        match serde_json::from_str(line) {
            Ok(event) => events.push(event),
            Err(error) if at + 1 == lines.len() && error.is_eof() => {}
            Err(error) => {
                let text = format!("{} line {}: {error}", path.display(), at + 1);
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
        }
    }
    Ok(events)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_flat_object_with_the_words_of_the_format() {
        let what = What::SendAcked { op: "1".to_owned(), message_id: None };
        let text = serde_json::to_string(&Event { t: 1.5, what }).unwrap();
        assert_eq!(text, r#"{"t":1.5,"type":"send-acked","op":"1"}"#);
    }

    #[test]
    fn what_was_recorded_reads_back_and_a_cut_last_line_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history.jsonl");
        let recorder = Recorder::new(Some(&path)).unwrap();
        recorder.record(0.5, What::Connected { device: "d".to_owned(), session: Some("s".to_owned()) });
        recorder.record(1.0, What::Fault { name: "kill-leader".to_owned(), phase: Phase::Start });
        let events = recorder.finish().unwrap();
        assert_eq!(read(&path).unwrap(), events);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 9]).unwrap();
        assert_eq!(read(&path).unwrap(), events[..1]);
    }

    #[test]
    fn of_a_sample_everything_is_kept_and_of_the_other_devices_nothing() {
        let recorder = Recorder::of_sample(None, 10).unwrap();
        for device in ["d0", "d7", "d10", "d101"] {
            recorder.record(0.0, What::Connected { device: device.to_owned(), session: None });
            recorder.record(1.0, What::SendAcked { op: format!("1.2@{device}"), message_id: None });
        }
        recorder.record(2.0, What::End {});
        let kept = recorder.finish().unwrap();
        let devices: Vec<_> = kept.iter().map(|event| event.what.device()).collect();
        assert_eq!(devices, [Some("d0"), Some("d0"), Some("d10"), Some("d10"), None]);
    }

    #[test]
    fn a_type_of_somebody_elses_is_read_and_means_nothing() {
        let event: Event = serde_json::from_str(r#"{"t":3,"type":"x-note","text":"hello"}"#).unwrap();
        assert_eq!(event.what, What::Other);
    }
}
