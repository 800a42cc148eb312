//! Drives one device connection: moves bytes between the TLS stream, the [`Session`] and the [`Attachment`].
//!
//! Decides nothing about the protocol. One task per connection, owned by the listener's tracker; it reads into a buffer that
//! lives for one poll only, so an idle connection holds none. While a write waits for the device nothing is read from it: a
//! device that does not read gets no answers either, and `write_timeout` ends it.

use std::{
    convert::Infallible,
    future::{poll_fn, ready},
    io,
    pin::{Pin, pin},
    task::{self, Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use martlet_proto::mcs::frame::{Decoder, Frame, FrameError};
use rand::Rng;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio_util::sync::CancellationToken;

use super::{
    Mcs,
    login::{self, Login, Rejected},
    session::{Action, CloseReason, Delivered, Session},
};
use crate::attach::{Acks, Attachment, Event, Note, Placed, Unfit, metrics::Fate};

/// Bytes taken from a socket at once, on the stack.
const READ_BYTES: usize = 4 * 1024;

/// Events written before the device is listened to again: its acks are not to wait for the end of a long queue.
const EVENTS_AT_ONCE: usize = 16;

/// After the last word, how long the peer's bytes are taken and thrown away: a socket closed over unread bytes resets, and the
/// reset may overtake what was written.
const LINGER: Duration = Duration::from_millis(500);

/// Serves a device from its first byte to the end of the connection.
pub(crate) async fn serve<S: AsyncRead + AsyncWrite + Unpin>(mcs: &Mcs, stream: S, drain: &CancellationToken) {
    // Boxed, both ends: what only they need is not to be paid for by every idle connection.
    let Some((mut connection, early)) = Box::pin(begin(mcs, stream, drain)).await else { return };
    let Err(ended) = connection.run(early, drain).await;
    Box::pin(connection.end(ended)).await;
}

/// From the first byte to the session, and the frames that came early; none when it does not come to a session.
async fn begin<'a, S: AsyncRead + AsyncWrite + Unpin>(
    mcs: &'a Mcs,
    stream: S,
    drain: &CancellationToken,
) -> Option<(Box<Connection<'a, S>>, Frames)> {
    let mut wire = Wire { stream, decoder: Decoder::of_client() };
    let wait = tokio::time::timeout(mcs.config.login_timeout, wire.first_frames());
    let first = tokio::select! {
        first = wait => first,
        () = drain.cancelled() => return None,
    };
    let Ok(Ok(mut frames)) = first else {
        mcs.metrics.logins_missing.inc();
        return None;
    };
    let first = frames.remove(0);
    let judged = login::judge(wire.decoder.version(), first.as_ref().map_err(|error| *error), &*mcs.credentials);
    match judged {
        Ok(login) => Some((admit(mcs, wire, login).await?, frames)),
        Err(Rejected { reason, answer }) => {
            mcs.metrics.rejected(reason);
            if let Some(answer) = answer {
                // Whether it arrives or not: the connection ends.
                let _ = wire.write(&answer, mcs.config.write_timeout).await;
            }
            wire.end().await;
            None
        }
    }
}

async fn admit<S: AsyncRead + AsyncWrite + Unpin>(
    mcs: &Mcs,
    mut wire: Wire<S>,
    mut login: Login,
) -> Option<Box<Connection<'_, S>>> {
    let Some(attachment) = mcs.attachments.open(login.tag) else {
        // Without a map there is no queue to attach to; the device comes back.
        wire.end().await;
        return None;
    };
    wire.decoder.logged_in();
    if !login.received.is_empty() {
        // Before the answer, which confirms them to the device, and before the attach, or they would be sent again.
        attachment.ack(Acks { sequences: Vec::new(), message_ids: std::mem::take(&mut login.received) });
        if tokio::time::timeout(mcs.config.login_ack_wait, acked(&attachment)).await.is_err() {
            mcs.metrics.logins_unconfirmed.inc();
            login.traits.acks_pending = true;
        }
    }
    let answer = login.answer(mcs.clock.wall_ms(), mcs.config.heartbeat_interval);
    if wire.write(&answer, mcs.config.write_timeout).await.is_err() {
        mcs.metrics.lost.inc();
        return None;
    }
    mcs.metrics.logins.inc();
    mcs.metrics.sessions.inc();
    attachment.attach();
    let session = Session::new(&mcs.config, login.traits, mcs.clock.now());
    Some(Box::new(Connection { mcs, wire, session, attachment, closing: None }))
}

/// Until the acks handed over are applied.
async fn acked(attachment: &Attachment) {
    loop {
        while let Some(event) = attachment.next() {
            if event == Event::Note(Note::Acked) {
                return;
            }
        }
        attachment.changed().await;
    }
}

/// Why a connection is over.
#[derive(Debug)]
enum Ended {
    Closed(CloseReason),
    Lost,
}

impl From<io::Error> for Ended {
    fn from(_: io::Error) -> Self {
        Self::Lost
    }
}

#[derive(Debug)]
struct Connection<'a, S> {
    mcs: &'a Mcs,
    wire: Wire<S>,
    session: Session,
    attachment: Attachment,
    /// While draining: when this connection's turn is.
    closing: Option<Instant>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<'_, S> {
    /// Until the device is gone, or either side ended.
    async fn run(&mut self, early: Frames, drain: &CancellationToken) -> Result<Infallible, Ended> {
        self.frames(early).await?;
        let mut frame_since = None;
        // What waits from turn to turn is made once: to enter a timer costs more than a frame.
        let mut drained = pin!(drain.cancelled());
        let mut alarm = pin!(tokio::time::sleep_until(self.session.deadline().into()));
        loop {
            let mut more = true;
            for _ in 0..EVENTS_AT_ONCE {
                let Some(event) = self.attachment.next() else {
                    more = false;
                    break;
                };
                self.event(event).await?;
            }
            let now = self.mcs.clock.now();
            let stalled = match (self.wire.decoder.is_inside_frame(), frame_since) {
                (false, _) => None,
                (true, since) => Some(since.unwrap_or(now)),
            };
            frame_since = stalled;
            let stalls_at = stalled.map(|since| since + self.mcs.config.frame_timeout);
            let wake = stalls_at.into_iter().chain(self.closing).fold(self.session.deadline(), Instant::min);
            // One that is early looks again: deadlines move away with every frame.
            if alarm.is_elapsed() || alarm.deadline() > wake.into() {
                alarm.as_mut().reset(wake.into());
            }
            tokio::select! {
                frames = self.wire.frames() => {
                    let frames = frames?.ok_or(Ended::Lost)?;
                    if !frames.is_empty() {
                        frame_since = None;
                    }
                    self.frames(frames).await?;
                }
                () = self.attachment.changed() => {}
                () = ready(()), if more => {}
                () = &mut drained, if self.closing.is_none() => {
                    let jitter = self.mcs.config.drain_spread.mul_f64(rand::rng().random::<f64>());
                    self.closing = Some(now + jitter);
                }
                () = &mut alarm => if self.mcs.clock.now() >= wake {
                    self.woken(stalls_at).await?;
                },
            }
        }
    }

    async fn end(self, ended: Ended) {
        match ended {
            Ended::Closed(reason) => self.mcs.metrics.closed(reason),
            Ended::Lost => drop(self.mcs.metrics.lost.inc()),
        }
        self.mcs.metrics.sessions.dec();
        self.mcs.metrics.unacked_forgotten.inc_by(self.session.forgotten());
        // First, so that the node knows before a peer that takes its time is gone.
        self.attachment.end(self.session.into_unsent_acks());
        self.wire.end().await;
    }

    async fn woken(&mut self, stalls_at: Option<Instant>) -> Result<(), Ended> {
        let now = self.mcs.clock.now();
        if stalls_at.is_some_and(|at| now >= at) {
            self.session.close(CloseReason::Protocol);
        } else if self.closing.is_some_and(|at| now >= at) {
            self.session.close(CloseReason::Draining);
        } else {
            self.session.at_deadline(now);
        }
        self.act().await
    }

    async fn frames(&mut self, frames: Frames) -> Result<(), Ended> {
        for frame in frames {
            self.mcs.metrics.frames_read.inc();
            self.session.receive(frame, self.mcs.clock.now());
            self.act().await?;
        }
        Ok(())
    }

    async fn event(&mut self, event: Event) -> Result<(), Ended> {
        match event {
            Event::Delivery(placed) => return self.delivery(&placed).await,
            Event::Note(Note::Acked) => self.session.applied(),
            Event::Note(Note::Superseded) => self.session.close(CloseReason::Superseded),
            Event::Note(Note::Overrun) => self.session.close(CloseReason::Overrun),
        }
        self.act().await
    }

    async fn delivery(&mut self, placed: &Placed) -> Result<(), Ended> {
        let fate = match self.attachment.check(placed, self.mcs.clock.now()) {
            Ok(()) => match self.session.deliver(placed.sequence, &placed.message) {
                Delivered::Written => {
                    self.act().await?;
                    Fate::Written
                }
                Delivered::Duplicate => Fate::Duplicate,
                Delivered::Malformed => {
                    tracing::error!(shard = placed.shard.0, "a stored message cannot be shown to a device");
                    Fate::Malformed
                }
            },
            Err(Unfit::Void) => Fate::Void,
            Err(Unfit::Expired) => Fate::Expired,
        };
        self.mcs.attachments.metrics().fate(fate);
        // After the write: what we say is written was taken by the socket.
        self.attachment.done(placed, self.session.written_through());
        Ok(())
    }

    async fn act(&mut self) -> Result<(), Ended> {
        while let Some(action) = self.session.next_action() {
            match action {
                Action::Write(frame) => {
                    self.wire.write(&frame, self.mcs.config.write_timeout).await?;
                    self.mcs.metrics.frames_written.inc();
                }
                Action::Ack(acks) => self.attachment.ack(acks),
                Action::Close(reason) => return Err(Ended::Closed(reason)),
            }
        }
        Ok(())
    }
}

/// The frames that one read completed; none, mostly, when they come byte by byte.
type Frames = Vec<Result<Frame, FrameError>>;

#[derive(Debug)]
struct Wire<S> {
    stream: S,
    decoder: Decoder,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    /// The first complete frame, and whatever came with it.
    async fn first_frames(&mut self) -> io::Result<Frames> {
        loop {
            let frames = self.frames().await?.ok_or(io::ErrorKind::UnexpectedEof)?;
            if !frames.is_empty() {
                return Ok(frames);
            }
        }
    }

    /// Reads once; `None` at the end of the stream. Safe to cancel: bytes are taken only in the poll that returns.
    async fn frames(&mut self) -> io::Result<Option<Frames>> {
        poll_fn(|cx| self.poll_frames(cx)).await
    }

    fn poll_frames(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Frames>>> {
        let mut bytes = [0; READ_BYTES];
        let mut buffer = ReadBuf::new(&mut bytes);
        task::ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer))?;
        let mut input = buffer.filled();
        if input.is_empty() {
            return Poll::Ready(Ok(None));
        }
        let mut frames = Vec::new();
        while let Some(frame) = self.decoder.decode(&mut input).transpose() {
            let is_last = frame.is_err();
            frames.push(frame);
            if is_last {
                break;
            }
        }
        Poll::Ready(Ok(Some(frames)))
    }

    /// One frame, one write, one flush: some clients lose the second of two in one chunk (device.md section 6).
    async fn write(&mut self, frame: &Bytes, timeout: Duration) -> io::Result<()> {
        let write = async {
            self.stream.write_all(frame).await?;
            self.stream.flush().await
        };
        tokio::time::timeout(timeout, write).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Takes bytes until there are no more.
    fn poll_throw_away(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut bytes = [0; READ_BYTES];
        loop {
            let mut buffer = ReadBuf::new(&mut bytes);
            match task::ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => {}
                Ok(()) | Err(_) => return Poll::Ready(()),
            }
        }
    }

    /// Ends the stream so that what was written arrives.
    async fn end(mut self) {
        let end = async {
            if self.stream.shutdown().await.is_ok() {
                poll_fn(|cx| self.poll_throw_away(cx)).await;
            }
        };
        // The peer has had its time.
        let _ = tokio::time::timeout(LINGER, end).await;
    }
}
