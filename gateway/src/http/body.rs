//! Reads request bodies within bounds.
//!
//! Owns the cap of one body, the time it may take, and the memory of all bodies of a kind together: a reader takes room before it keeps a
//! chunk, and gives it back when the [`Body`] is dropped.

use std::{sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::{StatusCode, body::Body as _, body::Incoming};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{HttpConfig, answer::Answer};
use crate::metrics::{Limit, Metrics};

/// Room is counted in these.
const UNIT_BYTES: usize = 1024;
/// Of a body that is refused, this much is read and thrown away, so that the client sees the answer instead of a reset.
const DISCARD_MAX_BYTES: u64 = 8 << 20;
/// Who sends nothing of it for this long is thought to be waiting for the answer.
const DISCARD_QUIET: Duration = Duration::from_secs(2);
/// The longest that a slow client's connection is kept for it; nginx's `lingering_time`.
const DISCARD_FOR: Duration = Duration::from_secs(30);

/// A whole body and the room it takes.
#[derive(Debug)]
pub(crate) struct Body {
    pub(crate) bytes: Bytes,
    _room: Vec<OwnedSemaphorePermit>,
}

/// The memory that bodies of one kind may take together.
#[derive(Debug)]
pub(crate) struct Room {
    units: Arc<Semaphore>,
    timeout: Duration,
    retry_after_secs: u32,
    metrics: Arc<Metrics>,
}

impl Room {
    /// Room for `total_bytes` of `http.body_bytes_total`.
    pub(crate) fn new(config: &HttpConfig, total_bytes: usize, metrics: Arc<Metrics>) -> Self {
        let units = (total_bytes / UNIT_BYTES).min(Semaphore::MAX_PERMITS);
        let (timeout, retry_after_secs) = (config.body_timeout, config.retry_after_secs);
        Self { units: Arc::new(Semaphore::new(units)), timeout, retry_after_secs, metrics }
    }

    /// The whole body, or the answer to give instead.
    pub(crate) async fn read(&self, mut incoming: Incoming, max_bytes: usize) -> Result<Body, Answer> {
        match tokio::time::timeout(self.timeout, self.collect(&mut incoming, max_bytes)).await {
            Ok(Ok(body)) => Ok(body),
            Ok(Err(answer)) => {
                let _ = tokio::time::timeout(DISCARD_FOR, discard(incoming)).await;
                Err(answer.closing())
            }
            Err(_) => {
                self.metrics.limit(Limit::Slow);
                Err(Answer::text(StatusCode::REQUEST_TIMEOUT, "Request Timeout\n").closing())
            }
        }
    }

    async fn collect(&self, incoming: &mut Incoming, max_bytes: usize) -> Result<Body, Answer> {
        let too_large = || {
            self.metrics.limit(Limit::Body);
            Answer::text(StatusCode::PAYLOAD_TOO_LARGE, format!("the body is above {max_bytes} bytes\n"))
        };
        if incoming.size_hint().lower() > max_bytes as u64 {
            return Err(too_large());
        }
        let mut bytes = BytesMut::new();
        let mut room = Vec::new();
        let mut taken = 0;
        while let Some(frame) = incoming.frame().await {
            let Ok(frame) = frame else {
                return Err(Answer::text(StatusCode::BAD_REQUEST, "the body could not be read\n"));
            };
            let Ok(chunk) = frame.into_data() else { continue };
            if bytes.len() + chunk.len() > max_bytes {
                return Err(too_large());
            }
            let units = (bytes.len() + chunk.len()).div_ceil(UNIT_BYTES);
            if units > taken {
                let more = u32::try_from(units - taken).unwrap_or(u32::MAX);
                let Ok(permit) = Arc::clone(&self.units).try_acquire_many_owned(more) else {
                    self.metrics.limit(Limit::BodyBytesTotal);
                    return Err(Answer::unavailable(self.retry_after_secs));
                };
                room.push(permit);
                taken = units;
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(Body { bytes: bytes.freeze(), _room: room })
    }
}

async fn discard(mut incoming: Incoming) {
    let mut seen = 0;
    while let Ok(Some(Ok(frame))) = tokio::time::timeout(DISCARD_QUIET, incoming.frame()).await {
        seen += frame.data_ref().map_or(0, |chunk| chunk.len() as u64);
        if seen > DISCARD_MAX_BYTES {
            return;
        }
    }
}
