"""Training: one configuration, one run; variants compared; what comes out evaluated and deployed."""
