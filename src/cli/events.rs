//! `tidelog events`.

use anyhow::Result;
use clap::Args;
use serde::Deserialize;

use tidelog::control::encode;
use tidelog::events::Event;

use super::{Session, output};

/// Show what happened on this node
#[derive(Args)]
pub struct EventsArguments {
    /// Go on with what happens from now on
    #[arg(long, short)]
    follow: bool,
    /// Only after this event's number, or from this time on (RFC 3339, or -15m)
    #[arg(long, value_name = "NUMBER|TIME", allow_hyphen_values = true)]
    since: Option<String>,
}

#[derive(Deserialize)]
struct Held {
    events: Vec<Event>,
}

pub async fn events(session: &Session, arguments: &EventsArguments) -> Result<()> {
    if !arguments.follow {
        let mut path = "/v1/events?follow=false".to_owned();
        if let Some(since) = &arguments.since {
            path.push_str(&format!("&since={}", encode(since)));
        }
        let show = |held: Held| {
            let lines: Vec<String> = held.events.iter().map(line).collect();
            if lines.is_empty() { "no events".to_owned() } else { lines.join("\n") }
        };
        return session.ask("GET", &path, None, show).await;
    }
    let mut stream = session.client.follow_events(arguments.since.as_deref()).await?;
    while let Some(event) = stream.next().await? {
        let text = if session.json { serde_json::to_string(&event)? } else { line(&event) };
        output::print(&text)?;
    }
    Ok(())
}

fn line(event: &Event) -> String {
    let group = event.group.as_deref().unwrap_or("-");
    format!(
        "{}  {:<7}  {:<18}  {group:<12}  {}",
        output::time(event.time),
        output::word(&event.severity),
        event.code,
        event.text
    )
}
