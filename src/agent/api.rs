//! The agent's socket: requests in, answers out.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::core::protocol::{Reply, Request, frame, parse_request};

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
pub(super) async fn serve(mut stream: UnixStream, calls: mpsc::Sender<Call>) {
    let mut pending = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        while let Some(end) = pending.iter().position(|byte| *byte == 0) {
            let message: Vec<u8> = pending.drain(..=end).collect();
            let reply = answer(&message[..end], &calls).await;
            if stream.write_all(&frame(&reply)).await.is_err() {
                return;
            }
        }
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(length) => pending.extend_from_slice(&buffer[..length]),
        }
        if pending.len() > LONGEST {
            let reply = Reply::bad(2, &format!("a request may have {LONGEST} bytes at most"));
            let _ = stream.write_all(&frame(&reply)).await;
            return;
        }
    }
}

async fn answer(message: &[u8], calls: &mpsc::Sender<Call>) -> Reply {
    let request = match parse_request(message) {
        Ok(request) => request,
        Err(reason) => return Reply::bad(2, &reason),
    };
    let (answer, reply) = oneshot::channel();
    let stopping = || Reply::bad(1, "the agent is stopping");
    if calls.send(Call { request, answer }).await.is_err() {
        return stopping();
    }
    reply.await.unwrap_or_else(|_| stopping())
}
