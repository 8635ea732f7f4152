//! A small TCP proxy between the peers: the link that the demo can cut and mend.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// A listener that carries connections to one address while it is not cut.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    target: SocketAddr,
    is_cut: AtomicBool,
    is_closed: AtomicBool,
    carried: Mutex<Vec<TcpStream>>,
}

impl Proxy {
    /// Listens on a free loopback port and carries connections to `target`.
    ///
    /// # Errors
    ///
    /// Where no port can be had.
    pub fn start(target: SocketAddr) -> std::io::Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            target,
            is_cut: AtomicBool::new(false),
            is_closed: AtomicBool::new(false),
            carried: Mutex::new(Vec::new()),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if accepting.is_closed.load(Ordering::SeqCst) {
                    return;
                }
                if let Ok(stream) = stream {
                    accepting.carry(stream);
                }
            }
        });
        Ok(Proxy { address, shared })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Drops what it carries, and whatever dials from now on.
    pub fn cut(&self) {
        self.shared.is_cut.store(true, Ordering::SeqCst);
        self.shared.drop_carried();
    }

    /// Carries again.
    pub fn mend(&self) {
        self.shared.is_cut.store(false, Ordering::SeqCst);
    }

    /// Frees the port.
    pub fn close(&self) {
        self.shared.is_closed.store(true, Ordering::SeqCst);
        // Wakes the accepting thread, so that it sees the word.
        let _ = TcpStream::connect(self.address);
        self.shared.drop_carried();
    }
}

impl Shared {
    fn carry(&self, near: TcpStream) {
        let mut carried = self.carried.lock().expect("no holder panics");
        // Under the lock, so that a cut cannot come between the question and the list.
        if self.is_cut.load(Ordering::SeqCst) {
            return;
        }
        let Ok(far) = TcpStream::connect(self.target) else { return };
        for stream in [&near, &far] {
            let _ = stream.set_nodelay(true);
            carried.extend(stream.try_clone());
        }
        for (from, to) in [(near.try_clone(), far.try_clone()), (Ok(far), Ok(near))] {
            if let (Ok(from), Ok(to)) = (from, to) {
                std::thread::spawn(move || pump(from, to));
            }
        }
    }

    fn drop_carried(&self) {
        for stream in self.carried.lock().expect("no holder panics").drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Carries bytes one way until either end closes.
fn pump(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_link_drops_what_it_carries_and_refuses_until_it_is_mended() {
        let echo = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = echo.local_addr().unwrap();
        std::thread::spawn(move || {
            for mut stream in echo.incoming().flatten() {
                std::thread::spawn(move || {
                    let mut byte = [0];
                    while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
                });
            }
        });
        let proxy = Proxy::start(target).unwrap();
        let asks = |stream: &mut TcpStream| {
            let mut byte = [0];
            stream.write_all(b"x").is_ok() && stream.read_exact(&mut byte).is_ok()
        };
        let mut first = TcpStream::connect(proxy.address()).unwrap();
        assert!(asks(&mut first));
        proxy.cut();
        assert!(!asks(&mut first));
        assert!(!TcpStream::connect(proxy.address()).is_ok_and(|mut stream| asks(&mut stream)));
        proxy.mend();
        assert!(asks(&mut TcpStream::connect(proxy.address()).unwrap()));
        proxy.close();
    }
}
