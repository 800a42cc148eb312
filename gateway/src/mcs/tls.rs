//! One device's TLS as a value: records come in and go out, nothing is kept while there are none.
//!
//! Drives rustls's unbuffered interface, because the buffered one keeps 4 KiB a connection for its next read, more than all the
//! rest of an idle device. Owns no socket. Three buffers, each allocated when there are bytes for it and given back when there
//! are none: records that are not whole, plaintext that was not taken, records that were not sent. `stream` bounds them: it reads
//! nothing while plaintext waits, and encrypts nothing while records wait.
//!
//! Invariant: the bytes handed to rustls always begin with the first it has not discarded, also when all we want is to write: it
//! remembers places in them, of handshake messages that are not whole.

use std::{fmt, sync::Arc};

use bytes::BytesMut;
use rustls::{
    Error, ServerConfig,
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, EncodeTlsData, EncryptError, UnbufferedStatus},
};

/// Largest plaintext that is encrypted at once: one record. Source: RFC 8446, section 5.1.
pub(super) const RECORD_MAX: usize = 16 * 1024;

/// What a record adds to its plaintext, in any suite, is less: header, explicit nonce, content type, tag.
const RECORD_EXTRA: usize = 64;

/// Input that may wait to become whole: a handshake message, which rustls bounds by 64 KiB, with what its records add.
const INCOMING_MAX: usize = 80 * 1024;

/// What is to be encrypted once the handshake is over.
#[derive(Debug, Clone, Copy)]
enum Wish<'a> {
    Nothing,
    Data(&'a [u8]),
    CloseNotify,
}

/// The server's side.
pub(super) struct Tls {
    rustls: UnbufferedServerConnection,
    incoming: Vec<u8>,
    /// Decrypted and not taken.
    pub(super) plain: BytesMut,
    /// Not sent.
    pub(super) outgoing: BytesMut,
    /// The peer said that it sends no more.
    pub(super) peer_closed: bool,
    failed: Option<Box<Error>>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Lengths only: what is in there is a device's.
        let lens = (self.incoming.len(), self.plain.len(), self.outgoing.len());
        f.debug_struct("Tls").field("lens", &lens).field("peer_closed", &self.peer_closed).finish_non_exhaustive()
    }
}

impl Tls {
    /// Before the first byte.
    ///
    /// # Errors
    /// When rustls cannot use the configuration.
    pub(super) fn new(config: Arc<ServerConfig>) -> Result<Self, Error> {
        Ok(Self {
            rustls: UnbufferedServerConnection::new(config)?,
            incoming: Vec::new(),
            plain: BytesMut::new(),
            outgoing: BytesMut::new(),
            peer_closed: false,
            failed: None,
        })
    }

    /// Whether the handshake is still under way.
    pub(super) fn is_handshaking(&self) -> bool {
        self.rustls.is_handshaking()
    }

    /// Takes what the socket had, and uses it as scratch. Fills `plain`, and `outgoing` with what TLS itself has to say.
    ///
    /// # Errors
    /// What the peer did wrong; the alert that tells it so is in `outgoing`.
    pub(super) fn receive(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        if self.incoming.is_empty() {
            // Mostly the records are whole and never leave the stack.
            let used = self.advance(bytes, Wish::Nothing)?;
            self.incoming = bytes[used..].to_vec();
            return Ok(());
        }
        self.incoming.extend_from_slice(bytes);
        if self.incoming.len() > INCOMING_MAX {
            return Err(Error::General("a handshake message beyond every bound".to_owned()));
        }
        self.resume(Wish::Nothing)
    }

    /// Puts `data`, at most [`RECORD_MAX`] bytes, into `outgoing`.
    ///
    /// # Errors
    /// When the connection is past use.
    pub(super) fn encrypt(&mut self, data: &[u8]) -> Result<(), Error> {
        self.resume(Wish::Data(data))
    }

    /// Puts the end of the stream into `outgoing`.
    ///
    /// # Errors
    /// When the connection is past use.
    pub(super) fn close(&mut self) -> Result<(), Error> {
        self.resume(Wish::CloseNotify)
    }

    // ------------------------------------------------------------------------------------------------------- details

    fn resume(&mut self, wish: Wish<'_>) -> Result<(), Error> {
        let mut incoming = std::mem::take(&mut self.incoming);
        let used = self.advance(&mut incoming, wish)?;
        if used < incoming.len() {
            incoming.drain(..used);
            self.incoming = incoming;
        }
        Ok(())
    }

    /// Lets rustls take what it can, and grants the wish; how many bytes of the input are done with. After an error rustls is
    /// asked for nothing but the alert: it panics over the same bad bytes again.
    fn advance(&mut self, input: &mut [u8], wish: Wish<'_>) -> Result<usize, Error> {
        if let Some(error) = &self.failed {
            return Err((**error).clone());
        }
        let advanced = self.advance_until_blocked(input, wish);
        if let Err(error) = &advanced {
            self.failed = Some(Box::new(error.clone()));
            while self.rustls.wants_write() {
                match self.rustls.process_tls_records(&mut []).state {
                    Ok(ConnectionState::EncodeTlsData(mut data)) => encode(&mut self.outgoing, &mut data)?,
                    Ok(ConnectionState::ReadTraffic(mut traffic)) => while traffic.next_record().is_some() {},
                    Ok(_) | Err(_) => break,
                }
            }
        }
        advanced
    }

    fn advance_until_blocked(&mut self, input: &mut [u8], mut wish: Wish<'_>) -> Result<usize, Error> {
        let mut used = 0;
        loop {
            let UnbufferedStatus { mut discard, state } = self.rustls.process_tls_records(&mut input[used..]);
            match state? {
                ConnectionState::ReadTraffic(mut traffic) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record?;
                        discard += record.discard;
                        self.plain.extend_from_slice(record.payload);
                    }
                }
                ConnectionState::EncodeTlsData(mut data) => encode(&mut self.outgoing, &mut data)?,
                // Its bytes are in `outgoing`, which goes in order.
                ConnectionState::TransmitTlsData(data) => data.done(),
                ConnectionState::PeerClosed => self.peer_closed = true,
                ConnectionState::WriteTraffic(mut traffic) => {
                    let room = match wish {
                        Wish::Nothing => return Ok(used + discard),
                        Wish::Data(data) => data.len() + RECORD_EXTRA,
                        Wish::CloseNotify => RECORD_EXTRA,
                    };
                    append(&mut self.outgoing, room, |room| {
                        let encrypted = match wish {
                            Wish::Data(data) => traffic.encrypt(data, room),
                            Wish::Nothing | Wish::CloseNotify => traffic.queue_close_notify(room),
                        };
                        encrypted.map_err(|error| match error {
                            EncryptError::InsufficientSize(size) => Some(size.required_size),
                            EncryptError::EncryptExhausted => None,
                        })
                    })?;
                    wish = Wish::Nothing;
                }
                ConnectionState::BlockedHandshake | ConnectionState::Closed => {
                    let is_granted = matches!(wish, Wish::Nothing);
                    return if is_granted { Ok(used + discard) } else { Err(Error::HandshakeNotComplete) };
                }
                // Early data is not accepted; what a later rustls may say besides, we could not follow.
                _ => return Err(Error::General("a state of TLS that is not served".to_owned())),
            }
            used += discard;
        }
    }
}

fn encode(outgoing: &mut BytesMut, data: &mut EncodeTlsData<'_, ServerConnectionData>) -> Result<(), Error> {
    append(outgoing, 0, |room| {
        data.encode(room).map_err(|error| match error {
            EncodeError::InsufficientSize(size) => Some(size.required_size),
            EncodeError::AlreadyEncoded => None,
        })
    })
}

/// Lets `write` append to `to`: it says how many bytes it wrote, or how many it needs.
fn append(
    to: &mut BytesMut,
    room: usize,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, Option<usize>>,
) -> Result<(), Error> {
    let before = to.len();
    to.resize(before + room, 0);
    let mut written = write(&mut to[before..]);
    if let Err(Some(required)) = written {
        to.resize(before + required, 0);
        written = write(&mut to[before..]);
    }
    to.truncate(before + *written.as_ref().unwrap_or(&0));
    written.map(drop).map_err(|_| Error::EncryptError)
}

#[cfg(test)]
mod tests;
