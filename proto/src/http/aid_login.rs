//! `Authorization: AidLogin <android id>:<security token>`: how a device proves itself on HTTP. Source: device.md section 3.

use crate::tag::{AndroidId, SecurityToken, decimal};

/// Reads the header's value; none when it is no such pair. Decimals may be signed: handsets print high-bit numbers negative.
pub fn parse(value: &str) -> Option<(AndroidId, SecurityToken)> {
    let (scheme, pair) = value.trim().split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("AidLogin") {
        return None;
    }
    let (id, token) = pair.trim().split_once(':')?;
    Some((AndroidId::new(decimal(id)?)?, SecurityToken::new(decimal(token)?)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rg_01_core_only_a_pair_under_its_scheme_is_one() {
        let (id, token) = parse("AidLogin 12:34").unwrap();
        assert_eq!((id.get(), token.get()), (12, 34));
        for value in ["", "AidLogin", "AidLogin 12", "AidLogin 12:", "AidLogin 0:1", "AidLogin a:b", "Bearer 12:34"] {
            assert!(parse(value).is_none(), "{value}");
        }
    }

    proptest! {
        #[test]
        fn any_value_is_answered(value: String) {
            let _ = parse(&value);
        }
    }
}
