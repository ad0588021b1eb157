//! A USB device that the kernel plays itself, behind a host controller of its own: it can have ids, names and a number
//! of ports of our choice, and come back with others, as a board does that goes into its boot loader.

use crate::plug::FIRST_PLUG;
use crate::vm::{SOON, Vm};

/// What the device has.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Function {
    /// A modem: `/dev/ttyACM#`.
    Modem,
    /// Eight serial interfaces. The kernel's generic driver finds the endpoints of all but 4 and 5: six `/dev/ttyUSB#`.
    Ports,
}

/// A device that is plugged in, with vendor id 2e8a, vendor `Lab` and serial number `G1`; unplugged on drop.
#[derive(Debug)]
pub(crate) struct Gadget<'vm> {
    vm: &'vm Vm,
    function: Function,
}

/// Where it is configured.
const DIRECTORY: &str = "/sys/kernel/config/usb_gadget/lab";

impl<'vm> Gadget<'vm> {
    /// Plugs it in. When this returns, udev's rules have run.
    #[track_caller]
    pub(crate) fn plug(vm: &'vm Vm, function: Function, product_id: u16, product: &str) -> Self {
        let (modules, kind, count, teach) = match function {
            Function::Modem => ("usb_f_acm cdc_acm", "acm", 1, String::new()),
            Function::Ports => {
                let teach = format!("&& echo 2e8a {product_id:04x} >/sys/bus/usb-serial/drivers/generic/new_id");
                ("usb_f_serial usbserial", "gser", 8, teach)
            }
        };
        // Made first, so that a part of it goes too.
        let gadget = Self { vm, function };
        vm.ok(&format!(
            "modprobe --all libcomposite dummy_hcd {modules} {teach} && mkdir {DIRECTORY} && cd {DIRECTORY} && \
             echo 0x2e8a >idVendor && mkdir strings/0x409 configs/c.1 && echo Lab >strings/0x409/manufacturer && \
             echo G1 >strings/0x409/serialnumber && for n in $(seq {count}); do \
             mkdir functions/{kind}.$n && ln -s functions/{kind}.$n configs/c.1 || exit; done",
        ));
        gadget.appear(product_id, product);
        gadget
    }

    /// Has it vanish, and come back with another product id and name.
    #[track_caller]
    pub(crate) fn come_back_as(&self, product_id: u16, product: &str) {
        self.vm.ok(&format!("echo >{DIRECTORY}/UDC && udevadm settle"));
        self.vm.wait_ok("the gadget to go", SOON, &format!("! {}", self.is_there()));
        self.appear(product_id, product);
    }

    #[track_caller]
    fn appear(&self, product_id: u16, product: &str) {
        self.vm.ok(&format!(
            "cd {DIRECTORY} && echo {product_id:#06x} >idProduct && echo '{product}' >strings/0x409/product && \
             echo dummy_udc.0 >UDC",
        ));
        let is_there = format!("{} && udevadm settle", self.is_there());
        self.vm.wait_ok(&format!("the gadget {product}"), FIRST_PLUG, &is_there);
    }

    /// A command that tells whether udev has made the links of its last interface.
    fn is_there(&self) -> &'static str {
        match self.function {
            Function::Modem => "ls /dev/serial/by-id/usb-Lab_*_G1-if00",
            Function::Ports => "ls /dev/serial/by-id/usb-Lab_*_G1-if07-port0",
        }
    }
}

impl Drop for Gadget<'_> {
    fn drop(&mut self) {
        let output = self.vm.sh(&format!(
            "cd {DIRECTORY} || exit 0; echo >UDC; rm -f configs/c.1/*.*; rmdir configs/c.1 functions/* strings/*; \
             cd .. && rmdir lab && udevadm settle && modprobe -r dummy_hcd",
        ));
        if !output.success() {
            eprintln!("could not remove the gadget: {}", output.stderr);
        }
    }
}
