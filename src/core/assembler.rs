//! eBPF instructions, and an assembler with labels for [`crate::core::filter_program`].

/// One eBPF instruction (linux/bpf.h, `struct bpf_insn`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Insn {
    code: u8,
    dst: u8,
    src: u8,
    off: i16,
    imm: i32,
}

impl Insn {
    /// An instruction from its fields, as linux/bpf.h names them.
    pub const fn new(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> Insn {
        Insn { code, dst, src, off, imm }
    }

    /// The eight bytes that the kernel reads, little-endian.
    pub fn to_bytes(self) -> [u8; 8] {
        let [off_low, off_high] = self.off.to_le_bytes();
        let [a, b, c, d] = self.imm.to_le_bytes();
        [self.code, self.src << 4 | self.dst, off_low, off_high, a, b, c, d]
    }
}

/// The program's bytes.
pub fn assemble(program: &[Insn]) -> Vec<u8> {
    program.iter().flat_map(|insn| insn.to_bytes()).collect()
}

#[derive(Clone, Copy)]
pub(super) struct Reg(u8);
pub(super) const R0: Reg = Reg(0);
pub(super) const R1: Reg = Reg(1);
pub(super) const R2: Reg = Reg(2);
pub(super) const R3: Reg = Reg(3);
pub(super) const R4: Reg = Reg(4);
pub(super) const R6: Reg = Reg(6);
pub(super) const R7: Reg = Reg(7);
pub(super) const R8: Reg = Reg(8);
pub(super) const R9: Reg = Reg(9);
pub(super) const R10: Reg = Reg(10);

// Operation codes (linux/bpf_common.h, linux/bpf.h).
pub(super) const W: u8 = 0x00;
pub(super) const DW: u8 = 0x18;
pub(super) const ADD: u8 = 0x00;
pub(super) const SUB: u8 = 0x10;
pub(super) const OR: u8 = 0x40;
pub(super) const AND: u8 = 0x50;
pub(super) const LSH: u8 = 0x60;
pub(super) const RSH: u8 = 0x70;
const NEG: u8 = 0x80;
pub(super) const XOR: u8 = 0xa0;
const MOV: u8 = 0xb0;
const JA: u8 = 0x00;
pub(super) const JEQ: u8 = 0x10;
pub(super) const JGT: u8 = 0x20;
pub(super) const JNE: u8 = 0x50;
const CALL: u8 = 0x80;
const EXIT: u8 = 0x90;
const CLASS_LD: u8 = 0x00;
const CLASS_LDX: u8 = 0x01;
const CLASS_ST: u8 = 0x02;
const CLASS_STX: u8 = 0x03;
const CLASS_ALU32: u8 = 0x04;
const CLASS_JMP: u8 = 0x05;
const CLASS_JMP32: u8 = 0x06;
const CLASS_ALU64: u8 = 0x07;
const MODE_MEM: u8 = 0x60;
const SOURCE_REG: u8 = 0x08;
/// Helper number (linux/bpf.h, `enum bpf_func_id`).
const MAP_LOOKUP_ELEM: i32 = 1;
/// `src_reg` of a 64-bit load that the kernel replaces by a map's address.
const PSEUDO_MAP_FD: u8 = 1;

#[derive(Default)]
pub(super) struct Assembler {
    insns: Vec<Insn>,
    labels: Vec<(&'static str, usize)>,
    jumps: Vec<(usize, &'static str)>,
}

impl Assembler {
    fn push(&mut self, code: u8, dst: Reg, src: Reg, off: i16, imm: i32) {
        self.insns.push(Insn { code, dst: dst.0, src: src.0, off, imm });
    }

    pub(super) fn label(&mut self, name: &'static str) {
        self.labels.push((name, self.insns.len()));
    }

    pub(super) fn mov(&mut self, dst: Reg, src: Reg) {
        self.push(CLASS_ALU64 | MOV | SOURCE_REG, dst, src, 0, 0);
    }

    pub(super) fn mov32(&mut self, dst: Reg, src: Reg) {
        self.push(CLASS_ALU32 | MOV | SOURCE_REG, dst, src, 0, 0);
    }

    /// Clears the upper half.
    pub(super) fn mov32_imm(&mut self, dst: Reg, imm: i32) {
        self.push(CLASS_ALU32 | MOV, dst, R0, 0, imm);
    }

    pub(super) fn mov_imm(&mut self, dst: Reg, imm: i32) {
        self.push(CLASS_ALU64 | MOV, dst, R0, 0, imm);
    }

    pub(super) fn alu64(&mut self, op: u8, dst: Reg, src: Reg) {
        self.push(CLASS_ALU64 | op | SOURCE_REG, dst, src, 0, 0);
    }

    pub(super) fn alu64_imm(&mut self, op: u8, dst: Reg, imm: i32) {
        self.push(CLASS_ALU64 | op, dst, R0, 0, imm);
    }

    pub(super) fn alu32_imm(&mut self, op: u8, dst: Reg, imm: i32) {
        self.push(CLASS_ALU32 | op, dst, R0, 0, imm);
    }

    pub(super) fn neg64(&mut self, dst: Reg) {
        self.push(CLASS_ALU64 | NEG, dst, R0, 0, 0);
    }

    pub(super) fn neg32(&mut self, dst: Reg) {
        self.push(CLASS_ALU32 | NEG, dst, R0, 0, 0);
    }

    pub(super) fn load(&mut self, size: u8, dst: Reg, src: Reg, off: i16) {
        self.push(CLASS_LDX | MODE_MEM | size, dst, src, off, 0);
    }

    pub(super) fn store(&mut self, size: u8, dst: Reg, off: i16, src: Reg) {
        self.push(CLASS_STX | MODE_MEM | size, dst, src, off, 0);
    }

    pub(super) fn store_imm(&mut self, size: u8, dst: Reg, off: i16, imm: i32) {
        self.push(CLASS_ST | MODE_MEM | size, dst, R0, off, imm);
    }

    pub(super) fn call(&mut self, helper: i32) {
        self.push(CLASS_JMP | CALL, R0, R0, 0, helper);
    }

    /// Loads a map's address, in two instructions.
    pub(super) fn map(&mut self, dst: Reg, map_fd: i32) {
        self.push(CLASS_LD | DW, dst, Reg(PSEUDO_MAP_FD), 0, map_fd);
        self.push(0, R0, R0, 0, 0);
    }

    /// R0 = the address of the value under the key at `R10 + key`, or 0.
    pub(super) fn lookup(&mut self, map_fd: i32, key: i16) {
        self.map(R1, map_fd);
        self.mov(R2, R10);
        self.alu64_imm(ADD, R2, i32::from(key));
        self.call(MAP_LOOKUP_ELEM);
    }

    pub(super) fn jump(&mut self, to: &'static str) {
        self.branch(CLASS_JMP | JA, R0, R0, 0, to);
    }

    pub(super) fn jump_imm(&mut self, op: u8, dst: Reg, imm: i32, to: &'static str) {
        self.branch(CLASS_JMP | op, dst, R0, imm, to);
    }

    pub(super) fn jump_reg(&mut self, op: u8, dst: Reg, src: Reg, to: &'static str) {
        self.branch(CLASS_JMP | op | SOURCE_REG, dst, src, 0, to);
    }

    /// Compares the low 32 bits: a verdict is an `int`.
    pub(super) fn jump32_imm(&mut self, op: u8, dst: Reg, imm: i32, to: &'static str) {
        self.branch(CLASS_JMP32 | op, dst, R0, imm, to);
    }

    fn branch(&mut self, code: u8, dst: Reg, src: Reg, imm: i32, to: &'static str) {
        self.jumps.push((self.insns.len(), to));
        self.push(code, dst, src, 0, imm);
    }

    pub(super) fn exit(&mut self) {
        self.push(CLASS_JMP | EXIT, R0, R0, 0, 0);
    }

    pub(super) fn finish(mut self) -> Vec<Insn> {
        for (at, name) in self.jumps {
            let target = self.labels.iter().find(|(label, _)| *label == name).expect("a jump's label exists").1;
            self.insns[at].off = (target as isize - at as isize - 1) as i16;
        }
        self.insns
    }
}
