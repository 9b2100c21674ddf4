from icrouting.routing.pids import late_third


def test_the_last_third_is_that_of_the_paper():
    assert late_third(30) == tuple(range(20, 30))
    # L/3*2+1 .. L counted from one, integer division
    assert late_third(32) == tuple(range(20, 32))
