//! The agent's socket: requests in, answers out.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc, oneshot};

use crate::agent::monitors::Monitors;
use crate::core::event::Event;
use crate::core::protocol::{Incoming, Reply, Request, frame, parse_request};

/// The longest request that is read.
const LONGEST: usize = 64 * 1024;

/// A request, and where its answer goes.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) request: Request,
    pub(super) answer: oneshot::Sender<Reply>,
}

/// Listens, for root alone. A socket that a killed agent left is replaced: whoever calls this holds the ledger's lock.
pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // The directory is 0700, so nobody comes in between bind and chmod.
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves one caller until it hangs up or sends something too long.
pub(super) async fn serve(mut stream: UnixStream, calls: mpsc::Sender<Call>, monitors: Monitors) {
    let mut pending = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        while let Some(end) = pending.iter().position(|byte| *byte == 0) {
            let message: Vec<u8> = pending.drain(..=end).collect();
            let (reply, events) = answer(&message[..end], &calls, &monitors).await;
            if stream.write_all(&frame(&reply)).await.is_err() {
                return;
            }
            if let Some(events) = events {
                return tell(stream, events, reply, calls).await;
            }
        }
        tokio::select! {
            biased;
            read = stream.read(&mut buffer) => match read {
                Ok(0) | Err(_) => return,
                Ok(length) => pending.extend_from_slice(&buffer[..length]),
            },
            // Nobody takes requests any more, and what was asked for until now is answered.
            () = calls.closed() => return,
        }
        if pending.len() > LONGEST {
            let reply = Reply::bad(2, &format!("a request may have {LONGEST} bytes at most"));
            let _ = stream.write_all(&frame(&reply)).await;
            return;
        }
    }
}

/// The answer, and what follows it where that is a stream.
async fn answer(
    message: &[u8],
    calls: &mpsc::Sender<Call>,
    monitors: &Monitors,
) -> (Reply, Option<broadcast::Receiver<Event>>) {
    let Incoming { request, .. } = match parse_request(message) {
        Ok(incoming) => incoming,
        Err(reason) => return (Reply::bad(2, &reason), None),
    };
    // Subscribed before the answer says so.
    let events = matches!(request, Request::Monitor(_)).then(|| monitors.subscribe());
    let (answer, reply) = oneshot::channel();
    let stopping = || (Reply::bad(1, "the agent is stopping: ask again once it runs, or once it is gone"), None);
    if calls.send(Call { request, answer }).await.is_err() {
        return stopping();
    }
    match (reply.await, events) {
        (Err(_), _) => stopping(),
        (Ok(reply), Some(events)) if reply.error.is_none() => (reply.continued(), Some(events)),
        (Ok(reply), _) => (reply, None),
    }
}

/// Hands on events until the caller hangs up. One that reads slowly keeps nobody waiting: events that it has no room for
/// are lost to it, and it is told how many.
async fn tell(mut stream: UnixStream, mut events: broadcast::Receiver<Event>, ready: Reply, calls: mpsc::Sender<Call>) {
    let only = match serde_json::from_value(ready.parameters) {
        Ok(Event::Ready { container: Some(container), id: Some(id) }) => Some((container, id)),
        _ => None,
    };
    let mut buffer = [0; 256];
    loop {
        let event = tokio::select! {
            event = events.recv() => match event {
                Ok(event) => event,
                Err(RecvError::Lagged(count)) => Event::Lost { count },
                Err(RecvError::Closed) => return,
            },
            // It has nothing more to say.
            read = stream.read(&mut buffer) => match read {
                Ok(0) | Err(_) => return,
                Ok(_) => continue,
            },
            () = calls.closed() => return,
        };
        if only.as_ref().is_none_or(|(container, id)| event.concerns(container, id))
            && stream.write_all(&frame(&Reply::good(event).continued())).await.is_err()
        {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::event::Changed;

    /// One that does not read keeps nobody waiting, and learns how much it has missed.
    #[test]
    fn a_slow_monitor_loses_events_and_is_told_how_many() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            const ALL: u64 = 20_000;
            let (ours, mut its) = UnixStream::pair().unwrap();
            let monitors = Monitors::new();
            let ready = Reply::good(Event::Ready { container: None, id: None });
            let (calls, _taken) = mpsc::channel(1);
            let telling = tokio::spawn(tell(ours, monitors.subscribe(), ready, calls));
            let event = |count| {
                let (container, id, device, path, origin) = Default::default();
                Event::Granted(Changed { container, id, device, path, origin, micros: Some(count) })
            };
            for count in 0..ALL {
                monitors.tell(|| event(count));
                tokio::task::yield_now().await;
            }
            drop(monitors);
            let mut text = Vec::new();
            its.read_to_end(&mut text).await.unwrap();
            telling.await.unwrap();
            let (mut next, mut lost) = (0, 0);
            for message in text.split(|byte| *byte == 0).filter(|message| !message.is_empty()) {
                let reply: Reply = serde_json::from_slice(message).unwrap();
                assert!(reply.continues);
                match serde_json::from_value(reply.parameters).unwrap() {
                    Event::Lost { count } => (lost, next) = (lost + count, next + count),
                    told => {
                        assert_eq!(told, event(next));
                        next += 1;
                    }
                }
            }
            assert_eq!(next, ALL);
            assert!(lost > ALL / 2, "{lost}");
        });
    }
}
