//! The bodies of HTTP, as pure codecs: what an app server sends and is answered, what a device enrols with.
//!
//! Bytes in, values out, and back. Status codes, headers beyond `Authorization`, sockets and clocks are the gateway's. The
//! invariant: any bytes are answered, within a bound that the caller has set on their number.
//!
//! | file | what | source |
//! | --- | --- | --- |
//! | `send` | a message of an app server, and the checks both forms share | gcm-http.md section 3 |
//! | `send_json`, `send_form` | its two spellings | sections 3 and 5 |
//! | `group` | making, changing and looking up device groups | section 9 |
//! | `reply` | what became of the targets, in the protocol's words | sections 4, 5.2, 7.1, 12 |
//! | `aid_login` | the `Authorization` of a device | device.md section 3 |
//! | `checkin` | the body of a check-in, gzipped or not | device.md section 2 |
//! | `register` | the form of register3 | device.md section 3 |
//! | `firebase` | installations and their tokens | device.md section 5.1 |

pub mod aid_login;
pub mod checkin;
pub mod firebase;
pub mod group;
pub mod iid;
pub mod register;
pub mod reply;
pub mod send;
pub mod send_form;
pub mod send_json;

pub use send::{BadRequest, SendRequest, Targets, Ttl};
