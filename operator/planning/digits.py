"""How figures are written for people. Pure."""


def three_digits(value: float) -> str:
    """Return a figure that tells enough and keeps noise from causing writes: 1230, 0.000375."""
    return f"{float(f'{value:.3g}'):.15g}"
