"""Who may use a cloudlet, and on what terms: prices and credit.

Nothing here knows HTTP or machines. Money is counted in whole millionths, time in whole seconds of use.
"""
