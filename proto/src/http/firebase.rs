//! Firebase installations: their bodies, and tokens that need no storage. Source: device.md section 5.1, design.md section 3.
//!
//! An installation's token is a MAC over (project, FID, expiry) under a check-in key, so any gateway makes and verifies it. The
//! invariant: a token says what it is good for, and nothing can be changed in it.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rand::RngCore;
use serde::Deserialize;
use serde_json::json;
use subtle::ConstantTimeEq as _;

use super::send::BadRequest;
use crate::{tag::CheckinKey, token::Iid};

/// Length of a FID, characters.
const FID_LEN: usize = 22;

/// Domain of the MAC: no other use of a check-in key begins so.
const DOMAIN: &[u8] = b"martlet: firebase installation, 1\0";

/// Expiry of a refresh token: none.
const NO_EXPIRY: u64 = u64::MAX;

/// What a client says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installation {
    /// 22 base64url characters.
    pub fid: Iid,
    /// Firebase app id; may be empty.
    pub app_id: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    #[serde(default)]
    fid: Option<String>,
    #[serde(default)]
    app_id: Option<String>,
}

/// Reads a body, JSON whatever its type says. A FID in another alphabet or length is normalised; without one, one is drawn.
///
/// # Errors
/// When it is no JSON object of strings, or the FID is none in any spelling.
pub fn parse(body: &[u8], rng: &mut impl RngCore) -> Result<Installation, BadRequest> {
    let body: Body = serde_json::from_slice(body).map_err(|error| BadRequest::new(format!("the body: {error}")))?;
    let fid = match body.fid.filter(|fid| !fid.is_empty()) {
        None => Iid::invent_fid(rng),
        Some(fid) => normalise(&fid).ok_or_else(|| BadRequest::new("fid: not 17 bytes in base64"))?,
    };
    Ok(Installation { fid, app_id: body.app_id.unwrap_or_default() })
}

fn normalise(fid: &str) -> Option<Iid> {
    let text: String = fid
        .chars()
        .take(FID_LEN)
        .map(|c| match c {
            '+' => '-',
            '/' => '_',
            other => other,
        })
        .collect();
    if text.len() == FID_LEN { Iid::parse(&text).ok() } else { None }
}

/// The answer of a new installation: `expires_ms` is when its token ends, `life_secs` how long that is.
pub fn answer(key: &CheckinKey, project: &str, fid: &Iid, expires_ms: u64, life_secs: u64) -> Vec<u8> {
    let body = json!({
        "name": format!("projects/{project}/installations/{}", fid.as_str()),
        "fid": fid.as_str(),
        "refreshToken": format!("2_{}", mint(key, project, fid, NO_EXPIRY)),
        "authToken": { "token": mint(key, project, fid, expires_ms), "expiresIn": format!("{life_secs}s") },
    });
    body.to_string().into_bytes()
}

/// An installation's token.
fn mint(key: &CheckinKey, project: &str, fid: &Iid, expires_ms: u64) -> String {
    let mac = URL_SAFE_NO_PAD.encode(mac(key, project, fid, expires_ms));
    format!("{}.{expires_ms:x}.{mac}", fid.as_str())
}

/// Whether `token` is an installation's of this project, good at `now_ms`: its FID.
pub fn verify(key: &CheckinKey, project: &str, token: &str, now_ms: u64) -> Option<Iid> {
    let mut parts = token.strip_prefix("2_").unwrap_or(token).split('.');
    let (fid, expires, given) = (parts.next()?, parts.next()?, parts.next()?);
    let fid = Iid::parse(fid).ok()?;
    let expires_ms = u64::from_str_radix(expires, 16).ok()?;
    let given = URL_SAFE_NO_PAD.decode(given).ok()?;
    let genuine: bool = mac(key, project, &fid, expires_ms).ct_eq(given.as_slice()).into();
    (genuine && parts.next().is_none() && now_ms < expires_ms).then_some(fid)
}

fn mac(key: &CheckinKey, project: &str, fid: &Iid, expires_ms: u64) -> [u8; 32] {
    let project_len = u64::try_from(project.len()).unwrap_or(u64::MAX).to_be_bytes();
    key.mac(&[DOMAIN, &project_len, project.as_bytes(), fid.as_str().as_bytes(), &expires_ms.to_be_bytes()])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    fn key() -> CheckinKey {
        CheckinKey::new(1, [7; 32])
    }

    fn parsed(body: &str) -> Result<Installation, BadRequest> {
        parse(body.as_bytes(), &mut StdRng::seed_from_u64(1))
    }

    #[test]
    fn fi_02_core_every_spelling_of_a_fid_becomes_the_canonical_one() {
        for fid in ["cw+bCFTFNF/SlGmxM5YqEQA=", "cw-bCFTFNF_SlGmxM5YqEQA", "cw-bCFTFNF_SlGmxM5YqEQ"] {
            let installation = parsed(&format!(r#"{{"fid":"{fid}","appId":"a"}}"#)).unwrap();
            assert_eq!(installation.fid.as_str(), "cw-bCFTFNF_SlGmxM5YqEQ");
        }
        assert_eq!(parsed("{}").unwrap().fid.as_str().len(), FID_LEN);
        assert!(parsed(r#"{"fid":"short"}"#).is_err() && parsed("[").is_err());
    }

    #[test]
    fn fi_01_core_an_answer_has_all_four_fields_and_its_token_verifies_until_it_ends() {
        let fid = Iid::parse("cw-bCFTFNF_SlGmxM5YqEQ").unwrap();
        let body: serde_json::Value = serde_json::from_slice(&answer(&key(), "p", &fid, 1_000, 604_800)).unwrap();
        assert_eq!(body["authToken"]["expiresIn"], "604800s");
        let token = body["authToken"]["token"].as_str().unwrap();
        assert_eq!(verify(&key(), "p", token, 999), Some(fid.clone()));
        assert_eq!(verify(&key(), "p", token, 1_000), None);
        assert_eq!(verify(&key(), "q", token, 999), None);
        assert_eq!(verify(&CheckinKey::new(1, [8; 32]), "p", token, 999), None);
        assert_eq!(verify(&key(), "p", body["refreshToken"].as_str().unwrap(), 1 << 60), Some(fid));
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(body: Vec<u8>, token: String) {
            let _ = parse(&body, &mut StdRng::seed_from_u64(1));
            prop_assert_eq!(verify(&key(), "p", &token, 0), None);
        }
    }
}
