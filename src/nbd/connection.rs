//! One connection from its first byte to its last: greeting, options, then a session.

use std::io;
use std::net::Shutdown;
use std::sync::Arc;

use zerocopy::{FromBytes, IntoBytes};

use super::export::Exports;
use super::handshake::{Agreed, Handshake, OPTION_BYTES_MAX, Step};
use super::input::Input;
use super::keepers::Kept;
use super::sender::Sender;
use super::server::Shared;
use super::session::{End, Session};
use super::socket::{Deadline, Socket, send_all};
use super::wire::{OPTION_MAGIC, OptionHeader, greeting};
use crate::io::Clock;

/// Serves a connection until it ends, and closes it.
pub(super) fn serve(
    socket: &Arc<dyn Socket>,
    exports: &dyn Exports,
    shared: &Shared,
    clock: &dyn Clock,
) {
    let sender = Arc::new(Sender::new(Arc::clone(socket)));
    match negotiate(&sender, &**socket, exports, shared, clock) {
        Ok((agreed, input, _kept)) => {
            let name = agreed.info.name.clone();
            tracing::info!(export = %name, "nbd: client connected");
            let to_end = Arc::clone(&sender);
            let hang_up = Box::new(move || to_end.cut());
            let end = match agreed.device.attach(&socket.address(), hang_up) {
                // From here on the group does not go back by itself, and no restore begins: had
                // either done so before, then the client would have been told of something else.
                Ok(_client) if agreed.device.info() == agreed.info => {
                    Session::new(Arc::clone(socket), sender, input, agreed, shared, clock).run()
                }
                Ok(_) => End::NotServed,
                Err(error) => {
                    tracing::info!(export = %name, %error, "nbd: not served");
                    End::NotServed
                }
            };
            match end {
                End::Disconnected | End::Closed => {
                    tracing::info!(export = %name, "nbd: client disconnected");
                }
                End::Garbage => {
                    tracing::warn!(export = %name, "nbd: client sent what is no request; closed");
                }
                End::NotServed => {
                    tracing::info!(export = %name, "nbd: not served here any more; client closed");
                }
                End::Io(error) => {
                    tracing::info!(export = %name, %error, "nbd: client lost");
                }
            }
        }
        Err(NoAgreement::Ended(reason)) => tracing::debug!(reason, "nbd: no export was chosen"),
        Err(NoAgreement::Io(error)) => tracing::debug!(%error, "nbd: no export was chosen"),
    }
    socket.shutdown(Shutdown::Both);
}

/// Why a handshake did not come to an end.
enum NoAgreement {
    Ended(&'static str),
    Io(io::Error),
}

impl From<io::Error> for NoAgreement {
    fn from(error: io::Error) -> NoAgreement {
        NoAgreement::Io(error)
    }
}

impl From<&'static str> for NoAgreement {
    fn from(reason: &'static str) -> NoAgreement {
        NoAgreement::Ended(reason)
    }
}

/// The handshake; on success also what was received beyond it.
fn negotiate<'s>(
    sender: &Arc<Sender>,
    socket: &dyn Socket,
    exports: &dyn Exports,
    shared: &'s Shared,
    clock: &dyn Clock,
) -> Result<(Agreed, Input, Option<Kept<'s>>), NoAgreement> {
    const CUT_OFF: NoAgreement = NoAgreement::Ended("the client left during the handshake");
    let limited = Deadline::within(shared.limits.handshake_timeout, socket, clock);
    let mut input = Input::new();
    send_all(&limited, greeting().as_bytes())?;
    let flags = input.hold(&limited, 4)?.ok_or(CUT_OFF)?;
    let flags = u32::from_be_bytes(flags.try_into().expect("4 bytes were asked for"));
    input.consume(4);
    let mut handshake = Handshake::new(exports, flags)?;
    let mut replies = Vec::new();
    loop {
        let header = input.hold(&limited, OptionHeader::BYTES)?.ok_or(CUT_OFF)?;
        let header = OptionHeader::read_from_bytes(header).expect("the length was asked for");
        input.consume(OptionHeader::BYTES);
        if header.magic.get() != OPTION_MAGIC {
            return Err("the client sent what is no option".into());
        }
        let option = header.option.get();
        let length = usize::try_from(header.length.get()).expect("32 bits fit");
        let step = if header.length.get() <= OPTION_BYTES_MAX {
            let data = input.hold(&limited, length)?.ok_or(CUT_OFF)?;
            let step = handshake.on_option(option, Some(data), &mut replies);
            input.consume(length);
            step
        } else {
            if !input.skip(&limited, length)? {
                return Err(CUT_OFF);
            }
            handshake.on_option(option, None, &mut replies)
        };
        // Before the client knows that it may go on: nothing of its old connection comes later.
        let kept = match &step {
            Step::Transmit(Agreed { keeper: Some(keeper), info, .. }) => {
                let kept = shared.counters.keepers.succeed(&info.name, *keeper, sender);
                Some(kept.ok_or(NoAgreement::Ended("the host's old connection does not end"))?)
            }
            _ => None,
        };
        send_all(&limited, &replies)?;
        replies.clear();
        match step {
            Step::Continue => {}
            Step::Close(reason) => return Err(reason.into()),
            Step::Transmit(agreed) => {
                socket.set_receive_timeout(None)?;
                socket.set_send_timeout(None)?;
                return Ok((agreed, input, kept));
            }
        }
    }
}
