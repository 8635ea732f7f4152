//! What a request asks for, and whether it may: a pure function over its header.

use super::wire::{Errno, PAYLOAD_BYTES_MAX, RequestHeader, command, command_flag};

/// DF reads above this are refused; the protocol asks for 64 KiB at least.
pub(super) const UNFRAGMENTED_BYTES_MAX: u32 = 1 << 20;

/// What holds for every request of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// Bytes of the export, as the client was told.
    pub(super) size_bytes: u64,
    /// Writes are refused.
    pub(super) read_only: bool,
    /// READ is answered in chunks.
    pub(super) structured_replies: bool,
    /// BLOCK_STATUS tells `base:allocation`.
    pub(super) allocation: bool,
}

/// A request that may be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Read { offset: u64, length: u32 },
    Write { offset: u64, length: u32, fua: bool },
    Zero { offset: u64, length: u32, fua: bool, no_hole: bool },
    Trim { offset: u64, length: u32, fua: bool },
    Flush,
    Cache { offset: u64, length: u32 },
    Status { offset: u64, length: u32, one: bool },
    Disconnect,
}

/// Checks a request. On refusal, the error and a text for people; the payload of a WRITE follows in
/// either case.
pub(super) fn check(
    header: &RequestHeader,
    rules: &Rules,
) -> Result<Command, (Errno, &'static str)> {
    use command_flag::{DF, FAST_ZERO, FUA, NO_HOLE, REQ_ONE};
    let flags = header.flags.get();
    let offset = header.offset.get();
    let length = header.length.get();
    let fua = flags & FUA != 0 && !rules.read_only;
    // Some clients set FUA on anything, so it is accepted everywhere, where it was offered.
    let always = if rules.read_only { 0 } else { FUA };
    let allowed = always
        | match header.command.get() {
            command::READ if rules.structured_replies => DF,
            command::WRITE_ZEROES => NO_HOLE | FAST_ZERO,
            command::BLOCK_STATUS => REQ_ONE,
            _ => 0,
        };
    let kind = header.command.get();
    if kind == command::DISC {
        return Ok(Command::Disconnect);
    }
    if kind > command::BLOCK_STATUS {
        return Err((Errno::Einval, "the command is not supported"));
    }
    if flags & !allowed != 0 {
        return Err((Errno::Einval, "a flag does not belong to this command"));
    }
    let writes = matches!(kind, command::WRITE | command::TRIM | command::WRITE_ZEROES);
    if writes && rules.read_only {
        return Err((Errno::Eperm, "the export is read-only"));
    }
    if kind == command::WRITE && length > PAYLOAD_BYTES_MAX {
        return Err((Errno::Einval, "the payload is larger than 32 MiB"));
    }
    if kind == command::READ && length > PAYLOAD_BYTES_MAX {
        let error = if rules.structured_replies { Errno::Eoverflow } else { Errno::Einval };
        return Err((error, "the request asks for more than 32 MiB"));
    }
    if kind == command::READ && flags & DF != 0 && length > UNFRAGMENTED_BYTES_MAX {
        return Err((Errno::Eoverflow, "more than 1 MiB is not sent unfragmented"));
    }
    let end = offset.checked_add(u64::from(length));
    if end.is_none_or(|end| end > rules.size_bytes) {
        let writes_past = matches!(kind, command::WRITE | command::WRITE_ZEROES);
        let error = if writes_past { Errno::Enospc } else { Errno::Einval };
        return Err((error, "the request is outside of the export"));
    }
    match kind {
        command::READ => Ok(Command::Read { offset, length }),
        command::WRITE => Ok(Command::Write { offset, length, fua }),
        command::TRIM => Ok(Command::Trim { offset, length, fua }),
        command::WRITE_ZEROES => {
            // A zero is one record of any length, so it is always fast.
            Ok(Command::Zero { offset, length, fua, no_hole: flags & NO_HOLE != 0 })
        }
        command::FLUSH if offset != 0 || length != 0 => {
            Err((Errno::Einval, "a flush has neither offset nor length"))
        }
        command::FLUSH => Ok(Command::Flush),
        command::CACHE => Ok(Command::Cache { offset, length }),
        _ if !rules.allocation => {
            Err((Errno::Einval, "no metadata context was selected for this export"))
        }
        _ if length == 0 => Err((Errno::Einval, "the status of nothing was asked for")),
        _ => Ok(Command::Status { offset, length, one: flags & REQ_ONE != 0 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::wire::request;

    const RULES: Rules =
        Rules { size_bytes: 1 << 20, read_only: false, structured_replies: true, allocation: true };

    fn refusal(command: u16, flags: u16, offset: u64, length: u32, rules: &Rules) -> Errno {
        check(&request(command, flags, 0, offset, length), rules).unwrap_err().0
    }

    #[test]
    fn each_refusal_has_the_error_that_the_protocol_names() {
        use command_flag::*;
        let read_only = Rules { read_only: true, ..RULES };
        let simple = Rules { structured_replies: false, allocation: false, ..RULES };
        let huge = PAYLOAD_BYTES_MAX + 1;
        for (command, flags, offset, length, rules, expected) in [
            (command::WRITE, 0, 0, 512, &read_only, Errno::Eperm),
            (command::TRIM, 0, 0, 512, &read_only, Errno::Eperm),
            (command::WRITE_ZEROES, 0, 0, 512, &read_only, Errno::Eperm),
            (command::WRITE, 0, (1 << 20) - 511, 512, &RULES, Errno::Enospc),
            (command::WRITE_ZEROES, 0, 1 << 20, 1, &RULES, Errno::Enospc),
            (command::WRITE, 0, u64::MAX, 1, &RULES, Errno::Enospc),
            (command::READ, 0, (1 << 20) - 511, 512, &RULES, Errno::Einval),
            (command::TRIM, 0, u64::MAX, u32::MAX, &RULES, Errno::Einval),
            (command::CACHE, 0, 1 << 20, 1, &RULES, Errno::Einval),
            (command::BLOCK_STATUS, 0, 1 << 20, 1, &RULES, Errno::Einval),
            (command::BLOCK_STATUS, 0, 0, 0, &RULES, Errno::Einval),
            (command::BLOCK_STATUS, 0, 0, 512, &simple, Errno::Einval),
            (command::WRITE, 0, 0, huge, &RULES, Errno::Einval),
            (command::READ, 0, 0, huge, &RULES, Errno::Eoverflow),
            (command::READ, 0, 0, huge, &simple, Errno::Einval),
            (command::READ, DF, 0, UNFRAGMENTED_BYTES_MAX + 1, &RULES, Errno::Eoverflow),
            (command::READ, DF, 0, 512, &simple, Errno::Einval),
            (command::READ, NO_HOLE, 0, 512, &RULES, Errno::Einval),
            (command::WRITE, FAST_ZERO, 0, 512, &RULES, Errno::Einval),
            (command::FLUSH, 0, 1, 0, &RULES, Errno::Einval),
            (command::CACHE, 1 << 9, 0, 512, &RULES, Errno::Einval),
            (8, 0, 0, 0, &RULES, Errno::Einval),
            (u16::MAX, 0, 0, 0, &RULES, Errno::Einval),
        ] {
            let got = refusal(command, flags, offset, length, rules);
            assert_eq!(got, expected, "command {command} flags {flags} {offset}+{length}");
        }
    }

    #[test]
    fn what_fits_is_taken() {
        let header = request(command::WRITE, command_flag::FUA, 7, (1 << 20) - 512, 512);
        let expected = Command::Write { offset: (1 << 20) - 512, length: 512, fua: true };
        assert_eq!(check(&header, &RULES), Ok(expected));
        let flags = command_flag::NO_HOLE | command_flag::FAST_ZERO;
        let header = request(command::WRITE_ZEROES, flags, 7, 0, 1 << 20);
        let expected = Command::Zero { offset: 0, length: 1 << 20, fua: false, no_hole: true };
        assert_eq!(check(&header, &RULES), Ok(expected));
        let header = request(command::READ, command_flag::FUA, 7, 1, 0);
        assert_eq!(check(&header, &RULES), Ok(Command::Read { offset: 1, length: 0 }));
    }
}
