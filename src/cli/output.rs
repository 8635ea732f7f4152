//! What commands print: aligned tables, sizes, ages, JSON. Data goes to standard output, all else
//! to standard error; a reader who has seen enough ends the command without an error.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use anyhow::Result;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde_json::Value;

use tidelog::units::{LogTime, Position};

/// Text as it is safe to show: what a host or a peer put into a name or a reason does not command
/// the terminal.
fn shown(text: &str) -> String {
    let commands = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    text.chars().map(|c| if commands(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// Prints text, ended by a line break.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(shown(text.trim_end()).as_bytes())?;
    out.write_all(b"\n")?;
    out.flush()?;
    Ok(())
}

/// Prints bytes as they are.
pub fn print_bytes(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()?;
    Ok(())
}

/// Prints JSON with line breaks.
pub fn print_json(value: &Value) -> Result<()> {
    print(&serde_json::to_string_pretty(value)?)
}

/// Prints why a command failed.
pub fn print_error(text: &str) {
    let line = text.lines().collect::<Vec<_>>().join(" ");
    let _ = writeln!(std::io::stderr(), "tidelog: {}", shown(&line));
}

/// Whether a person reads standard output.
pub fn is_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// A table of `rows` under `header`; columns whose header begins with `>` are aligned to the right.
/// `none` is the text where there are no rows.
pub fn table(header: &[&str], rows: Vec<Vec<String>>, none: &str) -> String {
    if rows.is_empty() {
        return none.to_owned();
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    if is_terminal() {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    }
    table.set_header(header.iter().map(|name| name.trim_start_matches('>')));
    table.add_rows(rows);
    for (index, name) in header.iter().enumerate() {
        if let Some(column) = table.column_mut(index) {
            column.set_padding((0, 2));
            if name.starts_with('>') {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// A bar of what is done of a whole, in 30 columns.
pub fn bar(done: u64, whole: u64) -> String {
    let whole = whole.max(1);
    let columns =
        usize::try_from(u128::from(done.min(whole)) * 30 / u128::from(whole)).unwrap_or(30);
    let percent = u128::from(done.min(whole)) * 100 / u128::from(whole);
    format!("[{}{}] {percent} %", "#".repeat(columns), "-".repeat(30 - columns))
}

/// A progress bar on standard error.
pub struct ProgressLine(indicatif::ProgressBar);

impl ProgressLine {
    /// A bar of a size that is not known yet.
    pub fn new() -> ProgressLine {
        let bar = indicatif::ProgressBar::new(0);
        let template = "{bar:30} {percent:>3} %  {bytes} of {total_bytes}, {bytes_per_sec}, {eta}";
        if let Ok(style) = indicatif::ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        ProgressLine(bar)
    }

    /// Shows what is done of a whole; nothing where the whole is not known.
    pub fn show(&self, done: u64, whole: u64) {
        if whole > 0 {
            self.0.set_length(whole);
            self.0.set_position(done);
        }
    }

    /// Takes it away.
    pub fn clear(&self) {
        self.0.finish_and_clear();
    }
}

/// A state as the word that JSON has for it.
pub fn word<T: serde::Serialize>(value: &T) -> String {
    let value = serde_json::to_value(value).unwrap_or_default();
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Wall-clock time here.
pub fn now() -> LogTime {
    LogTime::from_timestamp(jiff::Timestamp::now())
}

/// A duration with two units at most: `3m 20s`, `2d 4h`.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    if days > 0 {
        format!("{days}d {hours}h")
    } else if hours > 0 {
        format!("{hours}h {minutes}m")
    } else if minutes > 0 {
        format!("{minutes}m {}s", seconds % 60)
    } else if seconds >= 10 {
        format!("{seconds}s")
    } else {
        format!("{:.1}s", duration.as_secs_f64())
    }
}

/// A duration given in seconds.
pub fn seconds(seconds: f64) -> String {
    Duration::try_from_secs_f64(seconds).map_or_else(|_| "–".to_owned(), duration)
}

/// An age in its largest unit: `now`, `3 s`, `2 min`, `5 h`, `4 d`.
pub fn short_age(seconds: f64) -> String {
    match seconds {
        _ if !seconds.is_finite() || seconds < 0.0 => "–".to_owned(),
        _ if seconds < 0.5 => "now".to_owned(),
        _ if seconds < 90.0 => format!("{seconds:.0} s"),
        _ if seconds < 90.0 * 60.0 => format!("{:.0} min", seconds / 60.0),
        _ if seconds < 48.0 * 3600.0 => format!("{:.0} h", seconds / 3600.0),
        _ => format!("{:.0} d", seconds / 86_400.0),
    }
}

/// How long ago a moment was.
pub fn age(time: LogTime) -> String {
    format!("{} ago", duration(now().since(time)))
}

/// A moment to the second, in UTC.
pub fn time(time: LogTime) -> String {
    LogTime(time.0 / 1_000_000_000 * 1_000_000_000).to_string()
}

/// A position for people.
pub fn position(position: &Position) -> String {
    format!("lsn:{} ({}, {})", position.lsn, time(position.time), age(position.time))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_wrote_does_not_command_the_terminal() {
        let text = "volume \u{1b}[2Jx\r\u{9b}1m\tis\nÜ here";
        assert_eq!(shown(text), "volume \u{fffd}[2Jx\u{fffd}\u{fffd}1m\tis\nÜ here");
    }

    #[test]
    fn tables_are_aligned_and_durations_short() {
        let rows = vec![
            vec!["a".to_owned(), "1 GiB".to_owned()],
            vec!["longer".to_owned(), "10 GiB".to_owned()],
        ];
        let text = table(&["NAME", ">SIZE"], rows, "none");
        assert_eq!(text, "NAME      SIZE\na        1 GiB\nlonger  10 GiB");
        assert_eq!(table(&["NAME"], Vec::new(), "no groups"), "no groups");
        assert_eq!(duration(Duration::from_millis(1500)), "1.5s");
        assert_eq!(duration(Duration::from_secs(200)), "3m 20s");
        assert_eq!(duration(Duration::from_secs(200_000)), "2d 7h");
        let ages = [0.1, 3.2, 120.0, 18_000.0, 400_000.0, f64::NAN].map(short_age);
        assert_eq!(ages, ["now", "3 s", "2 min", "5 h", "5 d", "–"]);
    }
}
