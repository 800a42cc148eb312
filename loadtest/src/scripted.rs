//! A broker for tests: it answers requests in the order of a script, and nothing else.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use crate::http::HttpClient;

/// Head and body of one answer.
#[derive(Debug)]
pub(crate) struct Answer(Vec<u8>);

impl Answer {
    /// 200 with this body.
    pub(crate) fn ok(body: impl AsRef<[u8]>) -> Self {
        let body = body.as_ref();
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
        Self([head.as_bytes(), body].concat())
    }

    /// 503, and how many seconds to wait.
    pub(crate) fn busy(retry_after: Option<u32>) -> Self {
        let wait = retry_after.map_or_else(String::new, |secs| format!("retry-after: {secs}\r\n"));
        Self(format!("HTTP/1.1 503 Service Unavailable\r\n{wait}content-length: 5\r\n\r\nlater").into_bytes())
    }
}

/// See the module.
pub(crate) struct Scripted {
    address: SocketAddr,
    serving: JoinSet<()>,
}

impl Scripted {
    /// Serves one connection: the paths that are to be asked for, each with its answer.
    pub(crate) async fn start<const N: usize>(script: [(&'static str, Answer); N]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let (mut socket, _) = listener.accept().await.unwrap();
            for (path, answer) in script {
                let request = request(&mut socket).await;
                assert!(request.starts_with(&format!("POST {path} HTTP/1.1\r\n")), "{request}");
                socket.write_all(&answer.0).await.unwrap();
            }
        });
        Self { address, serving }
    }

    pub(crate) fn client(&self) -> HttpClient {
        HttpClient::new(&format!("http://{}", self.address)).unwrap()
    }

    /// Fails unless every answer was asked for.
    pub(crate) async fn ended(mut self) {
        self.serving.join_next().await.unwrap().unwrap();
    }
}

/// One request, whole.
async fn request(socket: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length =
                head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
            if body.len() >= length.unwrap_or(0) {
                return text;
            }
        }
        assert!(socket.read_buf(&mut bytes).await.unwrap() > 0, "closed in the middle of a request");
    }
}
