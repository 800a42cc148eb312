//! What this crate promises to others: formats that are frozen, the bytes that real clients write and read, and an
//! answer to whatever else arrives.

#![expect(clippy::unwrap_used, reason = "tests may unwrap")]

mod captures;
mod frozen;
mod hostile;
mod properties;

/// Bytes of a text of hex digits.
fn unhex(text: &str) -> Vec<u8> {
    assert!(text.len().is_multiple_of(2), "{text}");
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}
