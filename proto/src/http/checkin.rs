//! The body of a check-in, as sent and as answered. Source: device.md section 2.
//!
//! Who a device is, is decided by the gateway's keys; this file reads and writes. Unpacking is bounded: a gzip bomb ends at
//! [`CHECKIN_MAX_BYTES`].

use std::io::{Read as _, Write as _};

use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use prost::Message as _;

use crate::{
    device::checkin::{AndroidCheckinRequest, AndroidCheckinResponse, GservicesSetting},
    limits::CHECKIN_MAX_BYTES,
    tag::{AndroidId, SecurityToken},
};

/// Why a body is no check-in: status 400.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckinError {
    /// It says gzip and is none, or unpacks beyond the limit.
    #[error("the body is no gzip of at most {CHECKIN_MAX_BYTES} bytes")]
    Gzip,
    /// Not the protocol buffer.
    #[error("the body is no check-in request")]
    Malformed,
}

/// The identity a device says it has.
#[derive(Debug, Clone, Copy)]
pub enum Claimed {
    /// None: it is new.
    New,
    /// This pair.
    Known(AndroidId, SecurityToken),
    /// Numbers that no broker of ours gives.
    Foreign,
}

/// Reads a body; `gzipped` is what `Content-Encoding` says.
///
/// # Errors
/// See [`CheckinError`].
pub fn parse(body: &[u8], gzipped: bool) -> Result<Claimed, CheckinError> {
    let unpacked;
    let body = if gzipped {
        unpacked = unpack(body)?;
        &unpacked[..]
    } else {
        body
    };
    let request = AndroidCheckinRequest::decode(body).map_err(|_| CheckinError::Malformed)?;
    let id = request.id.unwrap_or_default().cast_unsigned();
    if id == 0 {
        return Ok(Claimed::New);
    }
    let token = request.security_token.unwrap_or_default();
    Ok(match (AndroidId::new(id), SecurityToken::new(token)) {
        (Some(id), Some(token)) => Claimed::Known(id, token),
        _ => Claimed::Foreign,
    })
}

fn unpack(body: &[u8]) -> Result<Vec<u8>, CheckinError> {
    let mut unpacked = Vec::new();
    let limit = u64::try_from(CHECKIN_MAX_BYTES).unwrap_or(u64::MAX).saturating_add(1);
    GzDecoder::new(body).take(limit).read_to_end(&mut unpacked).map_err(|_| CheckinError::Gzip)?;
    if unpacked.len() > CHECKIN_MAX_BYTES { Err(CheckinError::Gzip) } else { Ok(unpacked) }
}

/// The answer: the identity, the server's time (milliseconds since 1970), and settings, which replace what the client has.
pub fn answer<'a>(
    id: AndroidId,
    token: SecurityToken,
    time_ms: u64,
    settings: impl Iterator<Item = (&'a str, &'a str)>,
) -> Vec<u8> {
    let bytes = |text: &str| bytes::Bytes::copy_from_slice(text.as_bytes());
    let setting: Vec<_> =
        settings.map(|(name, value)| GservicesSetting { name: bytes(name), value: bytes(value) }).collect();
    let response = AndroidCheckinResponse {
        stats_ok: true,
        time_msec: i64::try_from(time_ms).ok(),
        settings_diff: (!setting.is_empty()).then_some(false),
        setting,
        android_id: Some(id.get()),
        security_token: Some(token.get()),
        version_info: Some("martlet".to_owned()),
        ..AndroidCheckinResponse::default()
    };
    response.encode_to_vec()
}

/// The answer as gzip: for those who sent gzip and accept it. microG always unpacks, simple clients never do.
pub fn pack(body: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(body).expect("a vector takes every write");
    encoder.finish().expect("a vector takes every write")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Source: device.md section 10.
    const NEW: &str = "221660036a120803120c39342e302e343630362e353118017003b00100";
    const KNOWN: &str =
        "1084ade49df4a49be13a221660036a120803120c39342e302e343630362e35311801692bf20963811242207003b00100";

    fn unhex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn ck_11_core_the_captured_requests_are_read() {
        assert!(matches!(parse(&unhex(NEW), false), Ok(Claimed::New)));
        let Ok(Claimed::Known(id, token)) = parse(&unhex(KNOWN), false) else { panic!("a known pair") };
        assert_eq!((id.get(), token.get()), (4_234_066_615_089_043_076, 2_324_440_704_598_274_603));
    }

    #[test]
    fn ck_07_core_gzip_is_unpacked_up_to_the_limit() {
        assert!(matches!(parse(&pack(&unhex(NEW)), true), Ok(Claimed::New)));
        assert!(matches!(parse(&unhex(NEW), true), Err(CheckinError::Gzip)));
        assert!(matches!(parse(&pack(&vec![0; CHECKIN_MAX_BYTES + 1]), true), Err(CheckinError::Gzip)));
    }

    #[test]
    fn ck_01_core_an_answer_has_every_field_a_client_requires() {
        let (id, token) = (AndroidId::new(5).unwrap(), SecurityToken::new(6).unwrap());
        let response = AndroidCheckinResponse::decode(&answer(id, token, 7, [("a", "b")].into_iter())[..]).unwrap();
        assert!(response.stats_ok);
        assert_eq!((response.android_id, response.security_token, response.time_msec), (Some(5), Some(6), Some(7)));
        assert_eq!((response.settings_diff, response.setting.len()), (Some(false), 1));
        let plain = AndroidCheckinResponse::decode(&answer(id, token, 7, std::iter::empty())[..]).unwrap();
        assert_eq!(plain.settings_diff, None, "absent: keep your table");
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(body: Vec<u8>, gzipped: bool) {
            let _ = parse(&body, gzipped);
        }
    }
}
