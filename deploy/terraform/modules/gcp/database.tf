# Logins and their passwords are made by the lines of deploy/postgres/databases.sh, so that none stands in the state.
resource "google_sql_database_instance" "main" {
  project             = var.project
  region              = var.region
  name                = var.name
  database_version    = "POSTGRES_15"
  deletion_protection = var.protected
  settings {
    edition                     = "ENTERPRISE"
    tier                        = var.database.tier
    disk_size                   = var.database.gigabytes
    disk_autoresize             = true
    availability_type           = var.database.standby ? "REGIONAL" : "ZONAL"
    deletion_protection_enabled = var.protected
    ip_configuration {
      ipv4_enabled    = false
      private_network = google_compute_network.main.id
      ssl_mode        = "ENCRYPTED_ONLY"
    }
    backup_configuration {
      enabled                        = true
      point_in_time_recovery_enabled = true
      backup_retention_settings {
        retained_backups = 14
      }
    }
    database_flags {
      name  = "max_connections"
      value = "200"
    }
  }
  depends_on = [google_service_networking_connection.services]
}
