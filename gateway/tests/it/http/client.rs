//! An HTTP/1.1 client that sends exactly what it is told.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// A kept-alive connection.
pub(crate) struct Client(TcpStream);

#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then_some(value.trim())
        })
    }
}

impl Client {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        Self(TcpStream::connect(address).await.unwrap())
    }

    pub(crate) async fn raw(&mut self, bytes: &[u8]) -> Reply {
        self.0.write_all(bytes).await.unwrap();
        self.reply().await
    }

    /// One request with `Content-Length`.
    pub(crate) async fn request(&mut self, line: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        let mut bytes = format!("{line} HTTP/1.1\r\nHost: gcm\r\nContent-Length: {}\r\n", body.len()).into_bytes();
        for (name, value) in headers {
            bytes.extend(format!("{name}: {value}\r\n").bytes());
        }
        bytes.extend(b"\r\n");
        bytes.extend(body);
        self.raw(&bytes).await
    }

    async fn reply(&mut self) -> Reply {
        let mut seen = Vec::new();
        loop {
            if let Some(end) = seen.windows(4).position(|window| window == b"\r\n\r\n") {
                let head = String::from_utf8(seen[..end].to_vec()).unwrap();
                let mut reply = Reply {
                    status: head.split(' ').nth(1).unwrap().parse().unwrap(),
                    head,
                    body: seen[end + 4..].to_vec(),
                };
                let length: usize =
                    reply.header("content-length").expect("every answer has its length").parse().unwrap();
                while reply.body.len() < length {
                    self.read(&mut reply.body).await;
                }
                assert_eq!(reply.body.len(), length);
                rules(&reply);
                return reply;
            }
            self.read(&mut seen).await;
        }
    }

    async fn read(&mut self, into: &mut Vec<u8>) {
        assert!(self.0.read_buf(into).await.unwrap() > 0, "closed after {:?}", String::from_utf8_lossy(into));
    }
}

/// What holds for every answer (H028, H030, H031, H162).
fn rules(reply: &Reply) {
    assert!(reply.status != 200 || !reply.body.is_empty(), "an empty 200");
    if let Some(after) = reply.header("retry-after") {
        assert!(reply.status >= 500, "Retry-After on {}", reply.status);
        assert!(after.parse::<u32>().unwrap() >= 1);
    }
    if reply.header("content-type").is_some_and(|kind| kind.starts_with("application/json")) {
        assert!(!reply.text().contains("\" :"), "white space between a key and its colon");
    }
}
