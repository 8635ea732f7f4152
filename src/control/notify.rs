//! Calls the operator's program for each event that asks something of an operator, one at a time.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::{Arc, Weak};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::mpsc;

use crate::config::{NotifyConfig, cause};
use crate::events::{Event, Severity};

use super::context::Context;

/// Events that wait for a slow program; more are dropped, and are in the journal.
const WAITING_MAX: usize = 256;
/// How long the program may take over one event.
const PROGRAM_TIMEOUT: Duration = Duration::from_secs(60);

/// Starts calling the program that the configuration names at the time of each event.
pub fn start_notifying(context: &Arc<Context>) {
    let (sender, mut receiver) = mpsc::channel::<Event>(WAITING_MAX);
    context.events.follow(move |event| {
        if event.severity >= Severity::Warning {
            // A full queue is the program's own doing, and the journal has the event.
            let _ = sender.try_send(event.clone());
        }
        !sender.is_closed()
    });
    let context: Weak<Context> = Arc::downgrade(context);
    tokio::spawn(async move {
        while let Some(event) = receiver.recv().await {
            let Some(context) = context.upgrade() else { return };
            let notify = context.config.read().expect("no holder panics").notify.clone();
            drop(context);
            if let Some(notify) = notify
                && let Err(why) = call(&notify, &event).await
            {
                tracing::warn!("notify {}: event {}: {why}", notify.command[0], event.sequence);
            }
        }
    });
}

async fn call(notify: &NotifyConfig, event: &Event) -> Result<(), String> {
    let mut child = Command::new(&notify.command[0])
        .args(&notify.command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("could not be started: {}", cause(&error)))?;
    let pid = Pid::from_raw(i32::try_from(child.id()).map_err(|error| error.to_string())?);
    let text = serde_json::to_vec(event).map_err(|error| error.to_string())?;
    let mut ended = tokio::task::spawn_blocking(move || {
        if let Some(mut input) = child.stdin.take() {
            // A program that does not read its input may still do its work.
            let _ = input.write_all(&text).and_then(|()| input.write_all(b"\n"));
        }
        child.wait()
    });
    let status = match tokio::time::timeout(PROGRAM_TIMEOUT, &mut ended).await {
        Ok(status) => status,
        Err(_) => {
            let _ = kill(pid, Signal::SIGKILL);
            let _ = ended.await;
            return Err(format!("killed after {} s", PROGRAM_TIMEOUT.as_secs()));
        }
    };
    match status.map_err(|error| error.to_string())? {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("ended with {status}")),
        Err(error) => Err(cause(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::LogTime;

    #[tokio::test]
    async fn the_program_gets_the_event_on_standard_input() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("got");
        let event = Event {
            sequence: 7,
            time: LogTime(0),
            severity: Severity::Error,
            code: "backup-overdue".to_owned(),
            group: Some("g".to_owned()),
            text: "late".to_owned(),
            details: serde_json::Value::Null,
        };
        let script = format!("cat > {}", path.display());
        let command = ["/bin/sh", "-c", &script].map(str::to_owned).to_vec();
        call(&NotifyConfig { command }, &event).await.unwrap();
        let got: Event = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(got, event);
        let command = vec!["/bin/false".to_owned()];
        let why = call(&NotifyConfig { command }, &event).await.unwrap_err();
        assert!(why.contains("exit status: 1"), "{why}");
        let command = vec!["/no/such/program".to_owned()];
        assert!(call(&NotifyConfig { command }, &event).await.is_err());
    }
}
