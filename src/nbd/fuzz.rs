//! Bodies of the fuzz targets: bytes from outside against the handshake, a session and the client.
//! They have no result; a panic, an assertion or a hang is the finding.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::client::Client;
use super::connection::serve;
use super::ram::{RamDevice, RamExports};
use super::server::{NbdCounters, NbdLimits, Shared};
use super::socket::Socket;
use super::wire::{self, handshake_flag, option};
use crate::io::ManualClock;
use crate::units::LogTime;

/// A socket that plays back what the other side sends, a few bytes at a time, and forgets what is
/// sent.
pub struct Playback {
    input: Mutex<VecDeque<u8>>,
    /// Bytes that one receive yields at most.
    step: usize,
    sent: Mutex<Vec<u8>>,
}

impl Playback {
    /// Plays `input`, at most `step` bytes at once.
    #[must_use]
    pub fn new(input: &[u8], step: usize) -> Playback {
        Playback {
            input: Mutex::new(input.iter().copied().collect()),
            step,
            sent: Mutex::default(),
        }
    }

    /// What was sent to it.
    pub fn sent(&self) -> Vec<u8> {
        self.sent.lock().expect("no holder panics").clone()
    }
}

impl Socket for Playback {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut input = self.input.lock().expect("no holder panics");
        let count = buffer.len().min(self.step).min(input.len());
        for (target, byte) in buffer.iter_mut().zip(input.drain(..count)) {
            *target = byte;
        }
        Ok(count)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        self.sent.lock().expect("no holder panics").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn send_now(&self, bytes: &[u8]) -> io::Result<usize> {
        self.send(bytes)
    }

    fn shutdown(&self, _how: Shutdown) {}

    fn set_receive_timeout(&self, _timeout: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    fn set_send_timeout(&self, _timeout: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

/// Serves what `input` says, at most `step` bytes at once, from a small device in memory; what the
/// server sent.
pub fn converse(input: &[u8], step: usize) -> Vec<u8> {
    let exports = RamExports(vec![
        Arc::new(RamDevice::new("g/v", 64 << 10, false)),
        Arc::new(RamDevice::new("g/v@i", 64 << 10, true)),
    ]);
    let playback = Arc::new(Playback::new(input, step));
    let socket: Arc<dyn Socket> = Arc::clone(&playback) as Arc<dyn Socket>;
    let shared = Shared::new(NbdLimits::default(), Arc::new(NbdCounters::default()));
    serve(&socket, &exports, &shared, &ManualClock::new(LogTime(0)));
    playback.sent()
}

/// The client flags and options that begin a conversation about `g/v`.
#[must_use]
pub fn opening() -> Vec<u8> {
    let flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
    let mut bytes = u32::from(flags).to_be_bytes().to_vec();
    wire::put_option(&mut bytes, option::STRUCTURED_REPLY, &[]);
    let context = [&3u32.to_be_bytes()[..], b"g/v", &1u32.to_be_bytes(), &15u32.to_be_bytes()];
    let context = [&context.concat()[..], wire::allocation::NAME.as_bytes()].concat();
    wire::put_option(&mut bytes, option::SET_META_CONTEXT, &context);
    wire::put_option(&mut bytes, option::GO, &[&3u32.to_be_bytes()[..], b"g/v", &[0, 0]].concat());
    bytes
}

/// Anything at all against the handshake, in the first byte's step.
pub fn fuzz_handshake(data: &[u8]) {
    if let Some((step, input)) = data.split_first() {
        converse(input, 1 + usize::from(*step));
    }
}

/// Anything at all against a session that a proper handshake opened.
pub fn fuzz_transmission(data: &[u8]) {
    if let Some((step, input)) = data.split_first() {
        converse(&[&opening()[..], input].concat(), 1 + usize::from(*step) * 16);
    }
}

/// Anything at all against the client.
pub fn fuzz_client(data: &[u8]) {
    let playback = Playback::new(data, usize::MAX);
    if let Ok(mut client) = Client::over(playback, "playback", "g/v") {
        let mut buffer = [0; 8192];
        let _ = client.read(4096, &mut buffer);
        let _ = client.extents(0, 65536);
        let _ = client.flush();
    }
}
