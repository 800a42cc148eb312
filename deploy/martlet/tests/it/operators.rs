//! What an operator does while clients are served: ends a broker, creates projects, adds and revokes keys, skips an entry. On the
//! built executable.

use std::net::TcpStream;

use martlet_proto::mcs::stanza::Stanza;
use serde_json::json;

use crate::{
    app_server::{Http, send_json},
    broker::{Broker, ONE, TWO, martlet, shared, text},
    device::{PATIENCE, check_in},
    hostile::{APP, accepted, config_file, head, until},
};

#[test]
fn sigterm_answers_the_send_in_flight_says_close_to_devices_and_loses_nothing() {
    let config = config_file("[http]\nhandshake_timeout = \"1h\"\n[mcs]\nhandshake_timeout = \"1h\"\n");
    let mut broker = Broker::start_with(&["--config", text(config.path())]);
    let address = broker.address("http");
    let (here, away) = (check_in(&broker), check_in(&broker));
    let (token_here, token_away) = (here.register(&broker, APP, ONE.0), away.register(&broker, APP, ONE.0));
    let mut mcs = here.connect(&broker);
    // Received, and not acknowledged.
    let unacked = accepted(&send_json(&address, ONE.1, &json!({ "to": token_here, "data": { "n": 1 } })));
    assert_eq!(mcs.message().persistent_id.as_ref(), Some(&unacked));
    // A send whose body is half there, an idle connection, handshakes that never end.
    let body = json!({ "registration_ids": [token_away, token_here], "data": { "n": 2 } }).to_string();
    let mut in_flight = Http::connect(&address);
    in_flight.write(head(&format!("Content-Length: {}\r\n", body.len())).as_bytes());
    in_flight.write(&body.as_bytes()[..10]);
    let mut idle = Http::connect(&address);
    assert_eq!(idle.request("POST", "/nothing", &[], b"").status, 404);
    let half_open = ["mcs", "https"].map(|listener| TcpStream::connect(broker.address(listener)).unwrap());
    broker.ask_to_end();
    until("it accepts no more", || TcpStream::connect(&address).is_err());
    assert!(idle.try_answer().is_none(), "an idle connection is closed");
    in_flight.write(&body.as_bytes()[10..]);
    let answer = in_flight.answer();
    assert_eq!(answer.header("connection"), Some("close"));
    let json = answer.json();
    assert_eq!(json["success"], 2, "{json}");
    assert_eq!(mcs.closed(PATIENCE).last(), Some(&Stanza::Close));
    assert!(broker.ended().success(), "{}", broker.log_text());
    assert!(!broker.log_text().contains("took too long"), "half-open handshakes held it up");
    drop(half_open);
    broker.restart();
    let ids = [0, 1].map(|at| json["results"][at]["message_id"].as_str().map(ToOwned::to_owned));
    assert_eq!(away.connect(&broker).message().persistent_id, ids[0]);
    let mut again = here.connect(&broker);
    assert_eq!(again.message().persistent_id, Some(unacked));
    assert_eq!(again.message().persistent_id, ids[1]);
}

/// Runs `martlet admin` against a broker; whether it succeeded, and what it printed and said.
fn admin(node: &str, words: &[&str]) -> (bool, String, String) {
    let (status, out, said) = martlet(&[&["admin", "--node", node], words].concat());
    (status.success(), out, said)
}

/// The value behind `name` in lines of names and values.
fn printed<'a>(out: &'a str, name: &str) -> &'a str {
    let value = out.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    value.unwrap_or_else(|| panic!("no {name} in\n{out}"))
}

#[test]
fn a_new_key_works_and_a_revoked_one_gives_401_as_soon_as_the_command_has_returned() {
    let broker = Broker::start();
    let (http, node) = (broker.address("http"), broker.address("grpc"));
    let token = check_in(&broker).register(&broker, APP, ONE.0);
    let (done, out, said) = admin(&node, &["key", "add", ONE.0]);
    assert!(done, "{said}");
    let (key, id) = (printed(&out, "server key"), printed(&out, "key id"));
    accepted(&send_json(&http, key, &json!({ "to": token })));
    accepted(&send_json(&http, ONE.1, &json!({ "to": token })));
    let (_, shown, _) = admin(&node, &["project", "show", ONE.0]);
    assert!(!shown.contains(key) && !shown.contains(ONE.1), "keys are shown once\n{shown}");
    assert_eq!(printed(&shown, "sender id"), ONE.0);
    let (done, out, said) = admin(&node, &["key", "revoke", ONE.0, id]);
    assert!(done, "{said}");
    assert_eq!(out, "revoked: every gateway has confirmed\n");
    assert_eq!(send_json(&http, key, &json!({ "to": token })).status, 401);
    accepted(&send_json(&http, ONE.1, &json!({ "to": token })));
    let (_, shown, _) = admin(&node, &["project", "show", ONE.0]);
    let line = shown.lines().find(|line| line.contains("revoked")).unwrap_or_else(|| panic!("{shown}"));
    assert!(line.split_whitespace().any(|word| word == id), "{line}");
    // A key that is given, and one that another project has.
    let (done, out, said) = admin(&node, &["key", "add", ONE.0, "--server-key", "given-key-0123456789"]);
    assert!(done, "{said}");
    assert_eq!(printed(&out, "server key"), "given-key-0123456789");
    accepted(&send_json(&http, "given-key-0123456789", &json!({ "to": token })));
    let (done, _, said) = admin(&node, &["key", "add", TWO.0, "--server-key", "given-key-0123456789"]);
    assert!(!done && said.contains("key"), "{said}");
}

#[test]
fn projects_are_created_listed_and_shown_and_unknown_ones_are_named() {
    let broker = Broker::start();
    let (http, node) = (broker.address("http"), broker.address("grpc"));
    let (done, out, said) =
        admin(&node, &["project", "create", "--sender-id", "777", "--text-id", "my-app", "--name", "My app"]);
    assert!(done, "{said}");
    assert_eq!(printed(&out, "sender id"), "777");
    let key = printed(&out, "server key");
    let token = check_in(&broker).register(&broker, APP, "777");
    accepted(&send_json(&http, key, &json!({ "to": token })));
    let (done, out, _) = admin(&node, &["project", "create"]);
    assert!(done);
    let drawn = printed(&out, "sender id");
    assert!(drawn.len() == 12 && drawn.bytes().all(|byte| byte.is_ascii_digit()), "{drawn}");
    let (_, list, _) = admin(&node, &["project", "list"]);
    for word in [ONE.0, TWO.0, "777", drawn, "my-app", "My app", "live keys"] {
        assert!(list.contains(word), "{word} in\n{list}");
    }
    let (_, shown, _) = admin(&node, &["project", "show", "777"]);
    assert_eq!((printed(&shown, "text id"), printed(&shown, "name")), ("my-app", "My app"));
    assert!(shown.contains("live") && !shown.contains(key), "{shown}");
    let wrong: [&[&str]; 6] = [
        &["project", "show", "999"],
        &["key", "add", "999"],
        &["key", "revoke", "999", "1"],
        &["key", "revoke", "777", "99"],
        &["project", "create", "--sender-id", "777"],
        &["project", "create", "--sender-id", "abc"],
    ];
    for words in wrong {
        let (done, out, said) = admin(&node, words);
        assert!(!done && out.is_empty(), "{words:?} {out}");
        // The project or key that is meant, or what a sender id looks like.
        let named = words.iter().any(|word| said.contains(*word)) || said.contains("1 to 20 decimal digits");
        assert!(named, "{words:?}: {said}");
    }
}

#[test]
fn an_entry_that_was_applied_is_not_skipped_and_the_command_says_by_whom() {
    let broker = Broker::start();
    let node = broker.address("grpc");
    let skip = |shard: &str, index: &str, more: &[&str]| {
        let words = ["shard", "skip", shard, index, "--reason", "a test"];
        admin(&node, &[&words, more].concat())
    };
    let (done, out, said) = skip("0", "1", &[]);
    assert!(!done && out.is_empty(), "{out}");
    assert!(said.contains("entry 1 of shard 0 is not skipped") && said.contains("node 1 has applied it"), "{said}");
    let (done, _, said) = skip("9999", "1", &[]);
    assert!(!done && said.contains("there is no shard 9999"), "{said}");
    let (done, _, said) = skip("0", "1", &["--digest", "xyz"]);
    assert!(!done && said.contains("--digest xyz"), "{said}");
    let (done, out, said) = admin(&node, &["shard", "skips"]);
    assert!(done && out.contains("reason") && out.lines().count() <= 4, "{out}{said}");
    let (done, _, said) = admin(&node, &["shard", "skip", "0", "1"]);
    assert!(!done && said.contains("--reason"), "{said}");
    let (_, out, _) = admin(&node, &["cluster", "status"]);
    assert!(!out.contains("stopped: node"), "{out}");
}

#[test]
fn admin_against_a_node_that_is_down_says_which_and_what_to_do() {
    let (done, out, said) = admin("127.0.0.1:1", &["project", "list"]);
    assert!(!done && out.is_empty());
    assert!(said.contains("127.0.0.1:1") && said.contains("no node answers") && said.contains("--node"), "{said}");
    let (done, _, said) = admin("nonsense", &["project", "list"]);
    assert!(!done && said.contains("nonsense"), "{said}");
    // The first that answers is asked.
    let both = format!("127.0.0.1:1,{}", shared().address("grpc"));
    let (done, out, said) = admin(&both, &["project", "list"]);
    assert!(done && out.contains(ONE.0), "{said}");
    // An address that answers and is no node.
    let (done, _, said) = admin(&shared().address("http"), &["project", "list"]);
    assert!(!done && !said.trim().is_empty(), "{said}");
}
