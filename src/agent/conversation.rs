//! One who calls at the agent's socket: requests in, answers out.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Mutex, broadcast, mpsc, oneshot};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout, timeout_at};

use crate::agent::api::{Agent, Call, Peer};
use crate::agent::operators;
use crate::core::event::Event;
use crate::core::protocol::{Bad, Incoming, Reply, Request, frame, parse_request};
use crate::core::settings::Settings;
use crate::core::text::excerpt;
use crate::error::Result;
use crate::ops::containers::containers;
use crate::ops::devices::devices;
use crate::ops::explain::explain;
use crate::ops::verify::verify;
use crate::runtime;
use crate::sys::udev;

/// The longest request that is read.
const LONGEST: usize = 64 * 1024;
/// How long a caller may take for the rest of a request, and for taking an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves one caller until he hangs up, sends what is no request or something too long, or takes too long for it.
pub(super) async fn lead(mut stream: UnixStream, peer: Peer, turn: Rc<Mutex<()>>, agent: Agent) {
    let (mut pending, mut searched, mut buffer, mut begun) = (Vec::new(), 0, [0; 4096], Instant::now());
    loop {
        while let Some(end) = pending[searched..].iter().position(|byte| *byte == 0).map(|at| searched + at) {
            let message: Vec<u8> = pending.drain(..=end).collect();
            searched = 0;
            // One answer at a time for each user, until it is taken: some are long. Root's commands wait for nobody.
            let _turn = match peer.uid {
                0 => None,
                _ => tokio::select! {
                    turn = turn.lock() => Some(turn),
                    () = agent.calls.closed() => return,
                },
            };
            let Some((reply, events)) = answer(&message[..end], peer, &turn, &agent).await else { return };
            let Some(reply) = reply else { continue };
            if !write(&mut stream, &reply).await {
                return;
            }
            begun = Instant::now();
            if let Some(events) = events {
                drop(_turn);
                return tell(stream, events, reply, agent.calls).await;
            }
        }
        searched = pending.len();
        if searched > LONGEST {
            return refuse(peer, &format!("a request may have {LONGEST} bytes at most"));
        }
        let read = async {
            let read = stream.read(&mut buffer);
            // One who asks for nothing may stay.
            if searched == 0 { Ok(read.await) } else { timeout_at(begun + PATIENCE, read).await }
        };
        tokio::select! {
            biased;
            read = read => match read {
                Ok(Ok(length @ 1..)) => {
                    if searched == 0 {
                        begun = Instant::now();
                    }
                    pending.extend_from_slice(&buffer[..length]);
                }
                Ok(_) => return,
                Err(_) => return refuse(peer, "the rest of a request did not come"),
            },
            // Nobody takes requests any more, and what was asked for until now is answered.
            () = agent.calls.closed() => return,
        }
    }
}

/// Why nobody listens to this caller any more.
fn refuse(peer: Peer, reason: &str) {
    tracing::debug!("uid {} (pid {}) is hung up on: {}", peer.uid, peer.pid, excerpt(reason));
}

/// Whether he took it in time.
async fn write(stream: &mut UnixStream, reply: &Reply) -> bool {
    matches!(timeout(PATIENCE, stream.write_all(&frame(reply))).await, Ok(Ok(())))
}

type Answer = (Option<Reply>, Option<broadcast::Receiver<Event>>);

/// The answer, if the caller takes one, and what follows it where that is a stream; `None` where he is to be hung up on.
async fn answer(message: &[u8], peer: Peer, turn: &Mutex<()>, agent: &Agent) -> Option<Answer> {
    let Incoming { request, oneway, .. } = match parse_request(message) {
        Ok(incoming) => incoming,
        Err(Bad::Refused(reply)) => return Some((reply, None)),
        Err(Bad::NoMessage(reason)) => {
            refuse(peer, &reason);
            return None;
        }
    };
    // Subscribed before the answer says so.
    let events = matches!(request, Request::Monitor(_)).then(|| agent.monitors.subscribe());
    let reply = match request {
        Request::GetInfo(_) => Reply::info(),
        Request::GetInterfaceDescription(request) => Reply::description(&request),
        Request::Verify(request) if request.open == Some(true) && peer.uid != 0 => {
            operators::log_refusal(peer, &format!("open the devices of {}", request.container));
            Reply::denied()
        }
        request if peer.uid != 0 && !names_what_is_roots(&request) => {
            operators::log_refusal(peer, "name a device by a path that is not below /dev");
            Reply::bad(4, "others than root name devices by their paths below /dev")
        }
        // Looking takes as long as the container's file systems do.
        Request::Devices(_) | Request::Containers(_) | Request::Explain(_) | Request::Verify(_) => {
            // One at a time of root's, too.
            let _turn = if peer.uid == 0 { Some(turn.lock().await) } else { None };
            let settings = Arc::clone(&agent.settings.borrow());
            spawn_blocking(move || look(request, &settings))
                .await
                .unwrap_or_else(|_| Reply::bad(1, "looking for that failed"))
        }
        request => {
            let (answer, reply) = oneshot::channel();
            let is_change = matches!(request, Request::Attach(_) | Request::Detach(_));
            let has_operators = !agent.settings.borrow().operators.is_empty();
            let caller = match is_change && peer.uid != 0 && has_operators {
                // A name service may be slow.
                true => spawn_blocking(move || operators::caller(peer.uid)).await.ok(),
                false => None,
            };
            let sent = agent.calls.send(Call { request, peer, caller, answer }).await.is_ok();
            let stopping = || Reply::bad(1, "the agent is stopping: ask again once it runs, or once it is gone");
            if sent { reply.await.unwrap_or_else(|_| stopping()) } else { stopping() }
        }
    };
    let events = events.filter(|_| reply.error.is_none());
    let reply = if events.is_some() { reply.continued() } else { reply };
    Some(((!oneway).then_some(reply), events))
}

/// Whether what it calls a device is where root alone decides what is there: it is looked at with root's rights.
fn names_what_is_roots(request: &Request) -> bool {
    let device = match request {
        Request::Attach(its) => Some(&its.device),
        Request::Detach(its) => Some(&its.device),
        Request::Explain(its) => Some(&its.device),
        Request::Verify(its) => its.device.as_ref(),
        _ => None,
    };
    device.is_none_or(|path| udev::is_roots(path))
}

/// What the agent need not know: the host is looked at anew.
fn look(request: Request, settings: &Settings) -> Reply {
    let found = || -> Result<Reply> {
        Ok(Reply::good(match request {
            Request::Devices(request) => json!({ "devices": devices(settings, request.selector.as_deref())? }),
            Request::Containers(_) => json!({ "containers": containers(settings, runtime::scan())? }),
            Request::Explain(its) => {
                json!({ "explanation": explain(settings, &runtime::scan(), &its.container, &its.device, true)? })
            }
            Request::Verify(its) => {
                let open = its.open.unwrap_or_default();
                json!({ "proofs": verify(&runtime::scan(), &its.container, its.device.as_deref(), open)? })
            }
            _ => return Ok(Reply::bad(1, "that is not to be looked into")),
        }))
    };
    found().unwrap_or_else(|error| Reply::bad(error.exit_code(), &error.chain()))
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
        if only.as_ref().is_some_and(|(container, id)| !event.concerns(container, id)) {
            continue;
        }
        let reply = Reply::good(event).continued();
        let is_taken = tokio::select! {
            is_taken = write(&mut stream, &reply) => is_taken,
            () = calls.closed() => false,
        };
        if !is_taken {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::monitors::Monitors;
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
