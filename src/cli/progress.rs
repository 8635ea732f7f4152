//! How far a command is that takes long.

use std::future::Future;
use std::time::Duration;

use anyhow::Result;

use tidelog::control::ClientError;
use tidelog::control::api::ProgressInfo;

use super::{Session, output};

/// A name for the progress of this one call.
pub(super) fn ticket() -> String {
    let moment = output::now().0;
    format!("{}-{moment}", std::process::id())
}

/// Waits for `asking`, and on a terminal shows how far it is.
pub(super) async fn with_progress(
    session: &Session,
    path: &str,
    asking: impl Future<Output = Result<()>>,
) -> Result<()> {
    if !output::is_terminal() || session.json {
        return asking.await;
    }
    let bar = output::ProgressLine::new();
    tokio::pin!(asking);
    let mut ticks = tokio::time::interval(Duration::from_millis(200));
    loop {
        tokio::select! {
            result = &mut asking => {
                bar.clear();
                return result;
            }
            _ = ticks.tick() => {
                let progress: Result<Option<ProgressInfo>, ClientError> =
                    session.client.get(path).await;
                if let Ok(Some(progress)) = progress {
                    bar.show(progress.done_bytes, progress.total_bytes);
                }
            }
        }
    }
}
