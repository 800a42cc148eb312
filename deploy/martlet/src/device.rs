//! `martlet device`: a device at the terminal. It connects as the demo device of a data directory, prints what arrives, and
//! acknowledges it.
//!
//! Owns the printing and the reconnecting. A message is acknowledged after it was printed, never before.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use clap::Args;
use martlet_loadtest::{
    clock::RunClock,
    device::{Connection, trusting},
};
use martlet_proto::{device::mcs::DataMessageStanza, mcs::stanza::Stanza};
use tokio_util::sync::CancellationToken;

use crate::{connection, demo::DemoDevice, shutdown};

/// Pause before the broker is tried again, doubled up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(500);

/// Longest pause between two tries.
const RETRY_MAX: Duration = Duration::from_secs(10);

/// A connection that lasted this long was a good one: the pauses begin anew. Two devices with one identity take each other's
/// connection over, as often as they come back.
const GOOD_AFTER: Duration = Duration::from_secs(10);

/// The device asks for a sign of life after this silence, which also confirms its acknowledgements.
const PING_AFTER: Duration = Duration::from_secs(60);

/// Between two questions whether the last acknowledgement was seen.
const CONFIRM_WAIT: Duration = Duration::from_millis(200);

/// Questions before the device ends without the answer: a message may then come again.
const CONFIRM_TRIES: u32 = 25;

/// Arguments of `martlet device`.
#[derive(Debug, Args)]
pub(crate) struct DeviceArgs {
    /// Data directory of a running `martlet standalone`.
    #[arg(long, value_name = "DIR", default_value = "./martlet-data")]
    data: PathBuf,
    /// End after this many messages (those that arrive while it ends are printed, too); 0: never.
    #[arg(long, default_value_t = 0)]
    count: u64,
    /// Print each message as one line of JSON.
    #[arg(long)]
    json: bool,
}

/// Receives until a signal, or until `--count` messages have come.
///
/// # Errors
/// When the data directory is not that of a broker that was ready.
pub(crate) async fn run(args: DeviceArgs) -> Result<()> {
    let end = shutdown::on_signal()?;
    let device = DemoDevice::read(&args.data.join(crate::demo::FILE))?;
    let place = connection::Connection::read(&args.data.join(connection::FILE))?;
    let tls = trusting(place.ca_file.as_ref())?;
    let mut left = (args.count > 0).then_some(args.count);
    let mut pauses = Pauses::default();
    let mut unconfirmed = Vec::new();
    while !end.is_cancelled() && left != Some(0) {
        let opened = Connection::open(&place.mcs, Arc::clone(&tls), device.identity, unconfirmed.clone()).await;
        let (lost, lasted) = match opened {
            Ok(connection) => {
                eprintln!("connected to {}; waiting for messages to {}", place.mcs, device.app);
                unconfirmed.clear();
                let clock = RunClock::begin();
                let ended = receive(connection, &args, &mut left, &mut unconfirmed, &end).await;
                (ended.map_err(|error| error.context("connection lost")), clock.elapsed())
            }
            Err(error) => (Err(error), Duration::ZERO),
        };
        if let Err(error) = lost {
            let pause = pauses.after(lasted);
            eprintln!("{error:#}; trying again in {:.1} s", pause.as_secs_f64());
            tokio::select! { () = end.cancelled() => {}, () = tokio::time::sleep(pause) => {} }
        }
    }
    Ok(())
}

/// Pauses before the broker is tried again.
#[derive(Debug)]
struct Pauses {
    next: Duration,
}

impl Default for Pauses {
    fn default() -> Self {
        Self { next: RETRY_MIN }
    }
}

impl Pauses {
    /// The pause after a connection that lasted so long; zero for one that could not be opened.
    fn after(&mut self, lasted: Duration) -> Duration {
        if lasted >= GOOD_AFTER {
            self.next = RETRY_MIN;
        }
        let pause = self.next;
        self.next = (pause * 2).min(RETRY_MAX);
        pause
    }
}

async fn receive(
    mut connection: Connection,
    args: &DeviceArgs,
    left: &mut Option<u64>,
    unconfirmed: &mut Vec<String>,
    end: &CancellationToken,
) -> Result<()> {
    loop {
        let received = tokio::select! {
            () = end.cancelled() => return connection.close().await,
            () = tokio::time::sleep(PING_AFTER) => {
                connection.ping().await?;
                continue;
            }
            received = connection.next() => received?.context("the broker closed it, or this device connected elsewhere")?,
        };
        let Stanza::Data(data) = received.stanza else { continue };
        print(&data, args.json)?;
        unconfirmed.extend(data.persistent_id.clone());
        connection.stream_ack().await?;
        if let Some(left) = left {
            *left -= 1;
            if *left == 0 {
                return finish(connection, args.json).await;
            }
        }
    }
}

/// Ends only when the broker has shown that it saw the last acknowledgement: a message that was printed does not come again.
/// What still arrives meanwhile is acknowledged too, and so printed.
async fn finish(mut connection: Connection, json: bool) -> Result<()> {
    let mut tries = 0;
    while connection.confirmed_through() < connection.received_through() && tries < CONFIRM_TRIES {
        connection.ping().await?;
        tries += 1;
        let until = tokio::time::sleep(CONFIRM_WAIT);
        tokio::pin!(until);
        loop {
            tokio::select! {
                () = &mut until => break,
                received = connection.next() => match received?.map(|received| received.stanza) {
                    Some(Stanza::Data(data)) => print(&data, json)?,
                    Some(_) => {}
                    None => return Ok(()),
                },
            }
        }
    }
    connection.close().await
}

#[expect(clippy::print_stdout, reason = "messages are what the command is for")]
fn print(data: &DataMessageStanza, json: bool) -> Result<()> {
    let pairs: serde_json::Map<String, serde_json::Value> =
        data.app_data.iter().map(|pair| (pair.key.clone(), pair.value.clone().into())).collect();
    let message = serde_json::json!({
        "from": data.from,
        "category": data.category,
        "message_id": data.persistent_id,
        "collapse_key": data.token,
        "data": pairs,
    });
    if json {
        println!("{message}");
    } else {
        println!("message from {}: {}", data.from, serde_json::to_string_pretty(&message["data"])?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_that_do_not_last_are_followed_by_longer_and_longer_pauses() {
        let mut pauses = Pauses::default();
        // As when a second device with this identity takes the connection over each time.
        let brief = [0; 7].map(|_| pauses.after(Duration::from_millis(20)).as_millis());
        assert_eq!(brief, [500, 1_000, 2_000, 4_000, 8_000, 10_000, 10_000]);
        assert_eq!(pauses.after(GOOD_AFTER), RETRY_MIN);
        assert_eq!(pauses.after(Duration::ZERO), 2 * RETRY_MIN);
    }
}
