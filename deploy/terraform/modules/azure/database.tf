# The three databases and their logins are made by the lines of deploy/postgres/databases.sh.
resource "azurerm_postgresql_flexible_server" "main" {
  name                              = "${var.name}-${var.unique}"
  resource_group_name               = azurerm_resource_group.main.name
  location                          = azurerm_resource_group.main.location
  version                           = "15"
  sku_name                          = var.database.sku
  storage_mb                        = var.database.megabytes
  auto_grow_enabled                 = true
  backup_retention_days             = 14
  public_network_access_enabled     = false
  delegated_subnet_id               = azurerm_subnet.database.id
  private_dns_zone_id               = azurerm_private_dns_zone.database.id
  administrator_login               = "postgres_admin"
  administrator_password_wo         = var.database_superuser
  administrator_password_wo_version = var.superuser_version
  dynamic "high_availability" {
    for_each = var.database.standby ? [1] : []
    content {
      mode = "ZoneRedundant"
    }
  }
  lifecycle {
    ignore_changes = [zone, high_availability[0].standby_availability_zone]
  }
  depends_on = [azurerm_private_dns_zone_virtual_network_link.database]
}
