"""Reads of uniform registers that nothing has written are found, and none where all is written."""

import pytest

from conformance.machine_code import unwritten_reads

# Registers of both paths, of a descriptor of 64 bits and of a call are written; a loop reads what it writes at its end.
RIGHT = """
        /*0000*/                   ULDC.64 UR4, c[0x0][0x208] ;
        /*0010*/                   ISETP.NE.AND P0, PT, R2, RZ, PT ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   UMOV UR6, UR4 ;
        /*0040*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0050*/                   R2UR UR6, R3 ;
.L_x_2:
        /*0060*/                   UIADD3 UR8, UP0, UR6, 0x20, URZ ;
        /*0070*/                   UIADD3.X UR9, UR5, -0x3ffffff0, URZ, UP0, !UPT ;
        /*0080*/                   UIADD3.64 UR10, UR8, 0x40, URZ ;
        /*0090*/                   UMOV UR7, URZ ;
.L_x_3:
        /*00a0*/                   UIADD3 UR7, UR7, 0x1, URZ ;
        /*00b0*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8].tnspB, R24, gsb0 ;
        /*00c0*/                   HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR20].tnspB, R24, gsb0 ;
        /*00d0*/                   UISETP.LT.AND UP0, UPT, UR7, UR4, UPT ;
        /*00e0*/                   UMOV UR22, UR11 ;
        /*00f0*/                   BRA.U UP0, `(.L_x_3) ;
        /*0100*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
        /*0110*/                   LDG.E R4, desc[UR30][R2.64] ;
        /*0120*/                   EXIT ;
"""


def without(address: str) -> str:
    """RIGHT without an instruction."""
    return "\n".join(line for line in RIGHT.splitlines() if f"/*{address}*/" not in line)


def test_what_all_paths_write_is_written() -> None:
    written = "UMOV UR7, URZ ;\n        /*0098*/                   ULDC.64 UR22, c[0x0][0x210]"
    assert unwritten_reads(RIGHT.replace("UMOV UR7, URZ", written)) == []


def test_the_first_pass_of_a_loop_counts() -> None:
    """UR22, the descriptor of a second factor, is written at the end of the loop's body alone."""
    (found,) = unwritten_reads(RIGHT)
    assert found.startswith("UR22, which nothing has written (00c0: HGMMA.64x16x16")


@pytest.mark.parametrize(
    ("lost", "register"),
    [("0000", 4), ("0030", 6), ("0050", 6), ("0060", 8), ("0070", 9), ("0080", 10), ("0090", 7), ("0100", 30)],
)
def test_a_lost_instruction_is_found(lost: str, register: int) -> None:
    """Whatever it was: what it wrote is read later, on some path."""
    found = unwritten_reads(without(lost))
    assert any(each.startswith(f"UR{register}, which nothing has written") for each in found), found


@pytest.mark.parametrize("guard", ["@!PT", "@P3"])
def test_guards(guard: str) -> None:
    """An instruction that never runs reads nothing; one that may run does."""
    code = f"""
        /*0000*/             {guard} UMOV UR4, UR5 ;
        /*0010*/                   EXIT ;
    """
    assert len(unwritten_reads(code)) == (guard == "@P3")


def test_a_listing_that_cannot_be_read_is_an_error() -> None:
    """What is not read must not count as right."""
    with pytest.raises(ValueError, match="listing: got 'ptxas', without an instruction"):
        unwritten_reads("ptxas")
